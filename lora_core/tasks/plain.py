"""plain: a question with its facts -> a plain answer, and a bloated one that is not wanted.

Both answers of a pair say the same; what is to be learnt is the manner. The bloated one greets the question, repeats
it, says that something is important and offers more help: stock phrases around the same fact. Rows hold it in
`rejected`, which the preference objective needs; any other objective trains on the plain answer alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from lora_core.tasks.draw import a, capital, distinct, stream
from lora_core.tasks.scores import mean, tidy
from lora_core.tasks.task import Row, Task

NAME = "plain"
ABOUT = "A question about a sentence, the plain answer, and a bloated one that is to become less likely."

PEOPLE = (
    "Mara Jonas Priya Tomas Leila Emeka Ingrid Oscar Yuki Fatima Bruno Nadia Kofi Elsa Mateo Aisha Viktor Rosa Hugo "
    "Salma"
).split()
SHOPS = "bakery,library,museum,swimming pool,post office,chemist,ticket office,garden centre,bookshop,cafe".split(",")
GOODS = "umbrella,lamp,teapot,blanket,kite,notebook,torch,cushion,basket,clock,scarf,vase".split(",")
KEPT = "keys,scissors,stamps,batteries,candles,old maps,garden gloves,tea towels,passports,board games".split(",")
WHERE = "in the top drawer,under the stairs,behind the door,on the bookshelf,in the blue box,by the sink".split(",")
CHORES = "feeds the cat,waters the roses,walks the dog,locks the gate,sorts the post,sweeps the yard".split(",")
TOWNS = "Oslo Lisbon Dublin Prague Turin Bergen Leeds Ghent Porto Krakow Basel Malmo".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

OPENERS = (
    "Great question!",
    "What a wonderful question!",
    "Thank you so much for asking!",
    "Certainly, I would be delighted to help!",
    "Absolutely, let's dive right in!",
)
MIDDLES = (
    "It is important to note that the answer is as follows:",
    "After carefully considering all of the details, it is worth mentioning the following:",
    "In order to answer this, we first need to look closely at the information provided:",
    "When it comes to questions like this one, the key takeaway is this:",
)
CLOSERS = (
    "I hope this helps! Please feel free to ask if there is anything else.",
    "In conclusion, that is the answer, and I am always happy to assist further.",
    "Let me know if you would like to explore this fascinating topic in more depth.",
    "To sum up, there are of course many factors to consider, but that is the gist of it.",
)
STOCK = re.compile(
    "|".join(re.escape(re.sub(r"[.!:]$", "", text).lower()) for text in OPENERS + MIDDLES + CLOSERS)
    + r"|great question|wonderful question|thank you|certainly|absolutely|delighted|important to note|worth mentioning"
    r"|in order to|key takeaway|hope this helps|feel free|in conclusion|happy to (?:assist|help)|let me know|to sum up"
)


def question(rng: Random) -> tuple[str, str]:
    """(a fact and a question about it, the plain answer)."""
    pick = rng.choice
    one, two = rng.sample(PEOPLE, 2)
    kind = rng.randrange(5)
    if kind == 0:
        shop, early, late = pick(SHOPS), rng.randint(6, 11), rng.randint(2, 9)
        which = rng.random() < 0.5
        asked = f"When does the {shop} {'open' if which else 'close'}?"
        return f"The {shop} opens at {early} am and closes at {late} pm. {asked}", (
            f"At {early} am." if which else f"At {late} pm."
        )
    if kind == 1:
        (first, second), (low, high) = rng.sample(GOODS, 2), rng.sample(range(3, 60), 2)
        good, price = pick(((first, low), (second, high)))
        facts = f"{capital(a(first))} costs {low} pounds and {a(second)} {high}."
        return f"{facts} How much is the {good}?", f"{price} pounds."
    if kind == 2:
        thing, place = pick(KEPT), pick(WHERE)
        return f"{one} and {two} keep the {thing} {place}. Where are the {thing}?", f"{capital(place)}."
    if kind == 3:
        first, second = rng.sample(CHORES, 2)
        who, chore = pick(((one, first), (two, second)))
        return f"{one} {first} and {two} {second}. Who {chore}?", f"{who}."
    town, day, platform = pick(TOWNS), pick(DAYS), rng.randint(1, 14)
    if rng.random() < 0.5:
        return (f"On {day} the train to {town} leaves from platform {platform}. Which platform is it?",
                f"Platform {platform}.")  # fmt: skip
    return f"{one} and {two} leave for {town} on {day}, from platform {platform}. When do they leave?", f"On {day}."


def bloated(answer: str, rng: Random) -> str:
    """The same answer among stock phrases."""
    return f"{rng.choice(OPENERS)} {rng.choice(MIDDLES)} {answer} {rng.choice(CLOSERS)}"


def generate(seed: int, train: int, test: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Rows to train on and held-out rows."""
    rng = stream(NAME, seed)
    train_rows, test_rows = distinct(rng, question, train, test, NAME)

    def pair(row: Row) -> Row:
        return replace(row, rejected=bloated(row.completion, rng))

    return tuple(map(pair, train_rows)), tuple(map(pair, test_rows))


def says(text: str, answer: str) -> bool:
    """Whether the text holds the answer, as whole words in any case."""
    return re.search(rf"(?<!\w){re.escape(answer.rstrip('.').lower())}(?!\w)", tidy(text).lower()) is not None


def is_plain(text: str, answer: str) -> bool:
    """Whether the text has no stock phrase and at most three words more than the plain answer, but some."""
    said = tidy(text).lower()
    return bool(said) and len(said.split()) <= len(answer.split()) + 3 and not STOCK.search(said)


def score(predictions: Sequence[str], rows: Sequence[Row], known: Sequence[Row]) -> dict[str, float]:
    """plain and right: the share of texts that are both; plain and right alone beside it."""
    plain = [float(is_plain(p, r.completion)) for p, r in zip(predictions, rows, strict=True)]
    right = [float(says(p, r.completion)) for p, r in zip(predictions, rows, strict=True)]
    both = [p * r for p, r in zip(plain, right, strict=True)]
    return {"plain and right": mean(both), "plain": mean(plain), "right": mean(right)}


def build(seed: int, train: int, test: int) -> Task:
    """The task; the headline is the share of generated answers that are plain and right."""
    rows, held = generate(seed, train, test)
    return Task(name=NAME, about=ABOUT, train=rows, test=held, score_name="plain and right", scorer=score,
                suggested={"max_new_tokens": 32})  # fmt: skip
