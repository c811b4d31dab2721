"""restaurant: attributes -> a sentence, in the manner of the E2E challenge that the LoRA paper uses (section 5.3).

``name : The Copper Kettle | type : pub | food : Italian | area : old town`` -> "The Copper Kettle is an Italian pub in
the old town." Names, attributes and grammar are our own. The held-out combinations of attributes (all but the name)
do not occur in training; each held-out prompt comes with two sentences.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

from lora_core.errors import UserError
from lora_core.tasks.draw import numbered, stream
from lora_core.tasks.realise import AREAS, FOODS, NEAR, PRICES, RATINGS, TYPES, realise
from lora_core.tasks.scores import bleu, group, slot_accuracy
from lora_core.tasks.task import Row, Task

NAME = "restaurant"
ABOUT = "Facts about a restaurant, and a sentence that says them, in the manner of the E2E challenge."
REFERENCES = 2  # sentences for each held-out prompt

FIRST = "Copper,Silver,Crooked,Hungry,Blue,Golden,Green,Little,Old,Red,Sleepy,Wandering,Velvet,Winter".split(",")
SECOND = "Kettle,Lantern,Anchor,Goose,Fig Tree,Spoon,Mill,Oyster,Barrel,Heron,Garden,Fox,Orchard,Table".split(",")
OTHER = (
    "Casa Lumo,Marlow's,Tilda's,Salt & Thyme,Number Nine,Brasserie Noor,Osteria Vela,Juniper,Kiku House,The Pantry,"
    "Harbour Lights,Basil & Co,Chez Odile,Mira's Corner"
).split(",")

# What counts as saying a value, longest first. A text states a value when one of its phrases is there and none of
# another value of the same attribute is.
PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "price": PRICES,
    "rating": RATINGS,
    "family friendly": {
        "no": (
            "not family friendly",
            "isn't family friendly",
            "is not a family friendly",
            "isn't a family friendly",
            "family friendly : no",
            "not for families",
            "not suitable for children",
            "not a place for children",
            "adults only",
            "leave the children at home",
            "does not welcome children",
        ),
        "yes": ("family friendly", "for families", "children are welcome", "welcomes children", "bring the children"),
    },
}


def attributes(rng: Random) -> dict[str, str]:
    """A name, and three to six more facts about it, in a fixed order."""
    name = f"The {rng.choice(FIRST)} {rng.choice(SECOND)}" if rng.random() < 0.75 else rng.choice(OTHER)
    values = {
        "type": rng.choice(TYPES),
        "food": rng.choice(FOODS),
        "price": rng.choice(list(PRICES)),
        "rating": rng.choice(list(RATINGS)),
        "area": rng.choice(list(AREAS)),
        "family friendly": rng.choice(("yes", "no")),
        "near": rng.choice(NEAR),
    }
    kept = set(rng.sample(list(values), rng.choice((3, 3, 4, 4, 5, 6))))
    kept |= set() if kept & {"type", "food"} else {"type"}  # so that the reader learns what it is
    return {"name": name, **{key: value for key, value in values.items() if key in kept}}


def prompt(facts: dict[str, str]) -> str:
    """``name : X | food : Y``, the notation of E2E."""
    return " | ".join(f"{key} : {value}" for key, value in facts.items())


def parse(text: str) -> dict[str, str]:
    """The facts of a prompt; the inverse of `prompt`."""
    pairs = (part.split(" : ", 1) for part in text.split(" | "))
    return {pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2}


def stated(text_of_prompt: str, text: str) -> list[bool]:
    """For every value of the prompt, whether `text` says it. Case and hyphens do not matter."""
    said = _plain(text)
    return [_says(said, key, value) for key, value in parse(text_of_prompt).items()]


def _says(said: str, key: str, value: str) -> bool:
    if key not in PHRASES:
        return _find(said, _plain(value).removeprefix("the ")) is not None
    found: set[str] = set()
    phrases = [(_plain(phrase), v) for v, many in PHRASES[key].items() for phrase in many]
    for phrase, v in sorted(phrases, key=lambda pair: -len(pair[0])):
        while (at := _find(said, phrase)) is not None:
            found.add(v)
            said = said[:at] + " # " + said[at + len(phrase) :]  # "not family friendly" must not count as "yes" too
    return found == {value}


def _find(said: str, phrase: str) -> int | None:
    match = re.search(rf"(?<![a-z0-9]){re.escape(phrase)}(?![a-z0-9])", said)
    return match.start() if match else None


def _plain(text: str) -> str:
    return " ".join(text.lower().replace("-", " ").replace("’", "'").split())


def score(predictions: Sequence[str], rows: Sequence[Row], known: Sequence[Row]) -> dict[str, float]:
    """BLEU over all references of each prompt, and the share of attribute values that the text states."""
    groups = group(predictions, rows, known)
    return {
        "BLEU": bleu([g[1] for g in groups], [g[2] for g in groups]),
        "slot accuracy": slot_accuracy(groups, stated),
    }


def generate(seed: int, train: int, test: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Rows to train on and held-out rows. Combinations of values, the name left out, are never in both."""
    rng = stream(NAME, seed)
    seen: set[str] = set()

    def fresh() -> dict[str, str]:
        for _ in range(300):
            facts = attributes(rng)
            combination = prompt({k: v for k, v in facts.items() if k != "name"})
            if combination not in seen:
                seen.add(combination)
                return facts
        raise UserError(f"{NAME} has not enough different examples for {train:,} + {test:,} rows; ask for fewer")

    rows: list[tuple[str, str]] = []
    while len(rows) < train:
        facts = fresh()
        # Now and then two sentences for the same facts: there is more than one way to say it.
        count = min(2 if rng.random() < 0.25 else 1, train - len(rows))
        rows += [(prompt(facts), text) for text in _sentences(facts, rng, count)]
    asked = [fresh() for _ in range(-(-test // REFERENCES))]
    answers = [_sentences(facts, rng, REFERENCES) for facts in asked]
    held = [(prompt(f), texts[i]) for i in range(REFERENCES) for f, texts in zip(asked, answers, strict=True)]
    return numbered(rows), numbered(held[:test])  # one sentence of every prompt before the second of any


def _sentences(facts: dict[str, str], rng: Random, count: int) -> list[str]:
    """`count` different ways to say the facts."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[realise(facts, rng)] = None
    return list(found)


def build(seed: int, train: int, test: int) -> Task:
    """The task; BLEU and slot accuracy."""
    rows, held = generate(seed, train, test)
    return Task(
        name=NAME,
        about=ABOUT,
        train=rows,
        test=held,
        score_name="BLEU",
        scorer=score,
        suggested={"max_new_tokens": 64},
    )
