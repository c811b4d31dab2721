"""sentiment: a short review -> positive or negative.

The reviews come from a small grammar of our own. Plain ones can be judged by a single word; the others turn it over:
negation ("not a dull moment"), contrast (the second half decides), expectation ("I wanted to like it").
"""

from __future__ import annotations

from random import Random

from lora_core.tasks.draw import a, capital, distinct, stream
from lora_core.tasks.scores import score_labels
from lora_core.tasks.task import Row, Task

NAME = "sentiment"
ABOUT = "A short review, and the label positive or negative."
LABELS = ("positive", "negative")

Words = tuple[str, ...]
# things, their parts, good words, bad words, good verdicts, bad verdicts; every word fits every part of its kind
KINDS: dict[str, tuple[Words, Words, Words, Words, Words, Words]] = {
    "film": (
        ("film", "movie", "documentary", "thriller", "comedy"),
        ("script", "acting", "soundtrack", "story", "dialogue", "ending", "opening scene"),
        ("gripping", "clever", "moving", "original", "beautiful", "brilliant", "superb", "memorable"),
        ("dull", "clumsy", "tired", "lifeless", "weak", "flat", "forgettable", "awful"),
        ("I would watch it again", "I forgot the time"),
        ("I walked out early", "I looked at my watch all evening"),
    ),
    "meal": (
        ("restaurant", "bistro", "diner", "noodle bar", "pizzeria"),
        ("soup", "bread", "dessert", "pasta", "coffee", "fish", "salad", "curry"),
        ("delicious", "wonderful", "excellent", "superb", "perfect", "outstanding", "fantastic"),
        ("awful", "disappointing", "terrible", "dreadful", "mediocre", "horrible", "dire"),
        ("we are going back next week", "we ordered a second helping"),
        ("we won't be going back", "we left half of it on the plate"),
    ),
    "book": (
        ("novel", "memoir", "biography", "crime story", "short story"),
        ("plot", "prose", "first chapter", "translation", "ending", "narrator", "dialogue"),
        ("absorbing", "elegant", "witty", "sharp", "touching", "memorable", "brilliant", "fresh"),
        ("wooden", "tedious", "shallow", "muddled", "irritating", "lazy", "boring", "pretentious"),
        ("I couldn't put it down", "I read it twice"),
        ("I gave up halfway", "I fell asleep over it"),
    ),
    "hotel": (
        ("hotel", "guest house", "hostel", "bed and breakfast", "campsite"),
        ("bedroom", "bathroom", "garden", "pool", "lobby", "terrace", "bar"),
        ("spotless", "charming", "lovely", "peaceful", "delightful", "splendid", "welcoming", "well kept"),
        ("filthy", "shabby", "cramped", "noisy", "dreary", "unpleasant", "gloomy", "neglected"),
        ("we stayed an extra night", "we have booked again for next year"),
        ("we left a day early", "we slept badly"),
    ),
    "gadget": (
        ("phone", "laptop", "camera", "headset", "tablet"),
        ("battery", "screen", "charger", "microphone", "software", "speaker"),
        ("excellent", "superb", "first-rate", "impressive", "flawless", "fantastic", "reliable"),
        ("useless", "faulty", "poor", "shoddy", "unreliable", "hopeless", "terrible"),
        ("I use it every day", "I would buy it again"),
        ("I sent it back", "it is gathering dust in a drawer"),
    ),
    "trip": (
        ("guided tour", "concert", "workshop", "museum visit", "boat trip"),
        ("guide", "programme", "organisation", "venue", "opening talk", "second half"),
        ("superb", "engaging", "delightful", "wonderful", "first-class", "brilliant", "inspiring"),
        ("chaotic", "dreadful", "hopeless", "disappointing", "poor", "terrible", "uninspired"),
        ("I would sign up again", "I was sorry when it ended"),
        ("I left at the break", "I wished that I had stayed at home"),
    ),
}
STRONG = ("really", "truly", "absolutely", "utterly", "simply", "thoroughly")
PRAISE = (
    "I recommend it to everyone",
    "it was worth every penny",
    "it made my week",
    "my whole family loved it",
    "I am so glad that I tried it",
)
BLAME = (
    "I would not recommend it to anyone",
    "it was a waste of money",
    "it ruined my week",
    "nobody in my family liked it",
    "I want my money back",
)
HOPES = ("everyone had praised it", "my friends adored it", "the posters promised a lot", "I had high hopes")
FEARS = ("everyone had warned me", "my friends hated it", "I expected very little", "I had my doubts")


def generate(seed: int, train: int, test: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Rows to train on and held-out rows; half of each kind, give or take one."""
    turn = iter(range(10**9))

    def make(rng: Random) -> tuple[str, str]:
        good = next(turn) % 2 == 0
        return capital(review(rng, good)), LABELS[0] if good else LABELS[1]

    return distinct(stream(NAME, seed), make, train, test, NAME)


def review(rng: Random, good: bool) -> str:
    """One review that is good or bad as a whole."""
    things, parts, praise, blame, happy, angry = KINDS[rng.choice(list(KINDS))]
    thing, (part, other) = rng.choice(things), rng.sample(parts, 2)
    said, opposite = (praise, blame) if good else (blame, praise)
    word, second = rng.sample(said, 2)
    wrong = rng.choice(opposite)
    strong = rng.choice(STRONG)
    verdict = rng.choice(PRAISE + happy if good else BLAME + angry)
    hope, fear = rng.choice(HOPES), rng.choice(FEARS)
    this = rng.choice((f"this {thing}", f"the {thing}"))
    plain = (
        f"the {part} was {strong} {word}, and {verdict}.",
        f"{this} was {word} from beginning to end.",
        f"{strong} {word}, this {thing}: {verdict}.",
        f"I found {this} {word} and {second}.",
        f"what {a(word)} {thing}, and the {part} was {second}!",
        f"the {part} was {word}, the {other} {second}.",
        f"{this} has {a(word)} {part} and {a(second)} {other}.",
        f"{verdict}: the {part} was {strong} {word}.",
    )
    negated = (
        f"the {part} was not {wrong} at all, and {verdict}.",
        f"I can't say that {this} was {wrong}; {verdict}.",
        f"nothing about {this} was {wrong}, least of all the {part}.",
        f"there was nothing {wrong} about the {part}, and the {other} was {word}.",
        f"the {part} is anything but {wrong}.",
        f"nobody could call the {part} {wrong}; {verdict}.",
        f"far from being {wrong}, {this} was {strong} {word}.",
        f"never once did the {part} seem {wrong} to me.",
    )
    contrast = (
        f"the {part} was {wrong}, but the {other} was so {word} that {verdict}.",
        f"although the {part} was {wrong}, the {thing} as a whole was {word}.",
        f"the {part} may be {wrong}, yet {verdict}.",
        f"{wrong} at first, but then {strong} {word}: {verdict}.",
        f"despite {a(wrong)} {part}, {verdict}.",
        f"yes, the {part} was {wrong}; still, {verdict}.",
    )
    turned = (
        f"{fear if good else hope}, but {this} was {strong} {word}.",
        f"{fear if good else hope}, and yet {verdict}.",
        f"{fear if good else hope}; then came {a(word)} {part}, and {verdict}.",
        f"I wanted to {'dislike' if good else 'like'} {this}, but the {part} was too {word} for that.",
        f"{fear if good else hope}, but there was nothing {wrong} about the {part}.",
    )
    return rng.choice(rng.choices((plain, negated, contrast, turned), weights=(4, 3, 3, 2))[0])


def build(seed: int, train: int, test: int) -> Task:
    """The task; accuracy, where a prediction counts when its first word is the label."""
    rows, held = generate(seed, train, test)
    return Task(
        name=NAME,
        about=ABOUT,
        train=rows,
        test=held,
        score_name="accuracy",
        scorer=score_labels(LABELS),
        suggested={"max_new_tokens": 4},
    )
