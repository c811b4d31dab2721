"""pirate: plain English -> pirate talk.

The pirate follows fixed rules, so there is one right answer for each sentence: a list of words and phrases, -ing
loses its g, and what is called after the sentence depends on how it ends. `to_pirate` works on any sentence.
"""

from __future__ import annotations

import re
from random import Random

from lora_core.tasks.draw import a, capital, distinct, stream
from lora_core.tasks.scores import score_answers
from lora_core.tasks.task import Row, Task

NAME = "pirate"
ABOUT = "A plain English sentence, and how a pirate would say it."

WORDS = {
    "good morning": "ahoy",
    "good evening": "ahoy",
    "excuse me": "avast",
    "come on": "heave ho",
    "hurry up": "look lively",
    "right now": "afore the tide turns",
    "thank you": "bless ye",
    "at school": "up th' crow's nest",
    "to school": "t' th' crow's nest",
    "in the office": "on th' quarterdeck",
    "to bed": "t' th' hammock",
    "old man": "old salt",
    "my friend": "me hearty",
    "my friends": "me hearties",
    "hello": "ahoy",
    "hi": "ahoy",
    "hey": "ahoy",
    "yes": "aye",
    "no": "nay",
    "stop": "belay",
    "wait": "hold fast",
    "look": "feast yer eyes",
    "find": "dig up",
    "take": "plunder",
    "steal": "plunder",
    "you": "ye",
    "your": "yer",
    "yours": "yers",
    "my": "me",
    "is": "be",
    "am": "be",
    "are": "be",
    "i'm": "I be",
    "it's": "it be",
    "you're": "ye be",
    "we're": "we be",
    "isn't": "ben't",
    "aren't": "ben't",
    "the": "th'",
    "of": "o'",
    "and": "an'",
    "for": "fer",
    "to": "t'",
    "over": "o'er",
    "never": "ne'er",
    "ever": "e'er",
    "before": "afore",
    "between": "betwixt",
    "old": "barnacled",
    "big": "whale-sized",
    "new": "fresh-plundered",
    "great": "grand",
    "friend": "matey",
    "friends": "mateys",
    "boss": "cap'n",
    "teacher": "bosun",
    "neighbour": "shipmate",
    "neighbours": "shipmates",
    "colleague": "shipmate",
    "colleagues": "shipmates",
    "children": "young'uns",
    "child": "wee'un",
    "thief": "scallywag",
    "dog": "sea dog",
    "cat": "ship's cat",
    "bird": "parrot",
    "money": "doubloons",
    "wallet": "coin purse",
    "treasure": "booty",
    "present": "booty",
    "prize": "booty",
    "food": "grub",
    "lunch": "grub",
    "dinner": "grub",
    "beer": "grog",
    "coffee": "grog",
    "tea": "grog",
    "car": "ship",
    "bus": "galleon",
    "bike": "rowboat",
    "train": "frigate",
    "house": "cabin",
    "kitchen": "galley",
    "bathroom": "head",
    "bed": "hammock",
    "floor": "deck",
    "room": "berth",
    "office": "quarterdeck",
    "school": "crow's nest",
    "meeting": "parley",
    "map": "chart",
    "flag": "Jolly Roger",
    "telescope": "spyglass",
    "knife": "cutlass",
    "song": "shanty",
    "left": "port",
    "right": "starboard",
    "rain": "squall",
    "storm": "tempest",
    "lake": "briny deep",
    "pool": "briny deep",
    "sea": "briny deep",
}
CALLS = {".": ", arr!", "?": ", savvy?", "!": ", yo ho ho!"}
_LONGEST_FIRST = sorted(WORDS, key=lambda phrase: (-phrase.count(" "), -len(phrase)))
_PHRASE = re.compile(rf"\b(?:{'|'.join(map(re.escape, _LONGEST_FIRST))}|[a-z]{{2,}}ing)\b(?!')", re.IGNORECASE)
_ARTICLE = re.compile(r"\b([Aa])n? (?=[a-zA-Z])(\S+)")
_KEPT = {"king", "ring", "sing", "thing", "bring", "string", "spring", "wing", "swing", "sting", "during"}


def to_pirate(sentence: str) -> str:
    """What a pirate says instead. The same sentence always gives the same answer."""

    def change(found: re.Match[str]) -> str:
        plain = found.group(0)
        said = WORDS.get(plain.lower())
        if said is None:  # -ing
            return plain if plain.lower() in _KEPT or plain.lower().endswith("thing") else plain[:-1] + "'"
        return capital(said) if plain[0].isupper() else said

    text = _PHRASE.sub(change, sentence.strip())
    text = _ARTICLE.sub(lambda found: found[1] + a(found[2])[1:], text)  # "an old map" -> "a barnacled chart"
    return text[:-1] + CALLS[text[-1]] if text[-1:] in CALLS else text


PEOPLE = (
    "my friend",
    "my boss",
    "the teacher",
    "my neighbour",
    "our colleague",
    "the old man",
    "the thief",
    "my sister",
    "your cousin",
    "the baker",
    "my brother",
    "the doctor",
)
THINGS = (
    "the money",
    "my wallet",
    "the map",
    "the telescope",
    "your present",
    "the big prize",
    "the treasure",
    "my new bike",
    "the old flag",
    "the knife",
    "your dog",
    "the cat",
    "the bird",
    "a big box",
)
PLACES = (
    "in the kitchen",
    "in the office",
    "at school",
    "near the lake",
    "by the sea",
    "in the bathroom",
    "under the bed",
    "on the floor",
    "in my room",
    "behind the house",
    "over the bridge",
    "between the trees",
    "in the car",
    "on the train",
)
DOING = (
    "singing a song",
    "cooking dinner",
    "drinking coffee",
    "looking for money",
    "waiting for you",
    "cleaning the windows",
    "talking to the neighbours",
    "reading the map",
    "eating all the food",
    "sleeping",
    "fixing the bike",
    "hiding the treasure",
    "counting the money",
    "feeding the bird",
    "painting a flag",
    "laughing and shouting",
)
WANTS = (
    "find the treasure",
    "buy a new house",
    "take the bus",
    "drink a cup of tea",
    "stop the thief",
    "wait for the rain",
    "sail over the lake",
    "learn a new song",
    "go to bed early",
    "eat lunch by the sea",
    "meet your friends",
    "steal the flag",
    "paint the big room",
    "walk to school",
)
NOW = ("today", "right now", "again", "before lunch", "with my brother", "for the children", "all day")
LATER = ("tonight", "before dinner", "on Sunday", "in the morning", "after the storm", "with your sister", "again")
GREETINGS = ("Hello", "Hi", "Good morning", "Good evening", "Hey", "Excuse me")
TO = ("my friend", "my friends", "boss", "children", "everyone", "neighbour")


def sentence(rng: Random) -> str:
    """One plain sentence: a statement, a question, a request or a shout."""
    pick = rng.choice
    who, thing, place, doing, want = pick(PEOPLE), pick(THINGS), pick(PLACES), pick(DOING), pick(WANTS)
    now, later, hello, to = pick(NOW), pick(LATER), pick(GREETINGS), pick(TO)
    return capital(
        pick(
            (
                f"{who} is {doing} {now}.",
                f"{who} wants to {want} {later}.",
                f"{hello}, {to}, {who} is {doing}.",
                f"{thing} is {place}.",
                f"I am {doing}, and {who} is {place}.",
                f"we are going to {want} {later}.",
                f"yes, {who} is {doing} {place}.",
                f"no, {thing} is not {place}.",
                f"I think that {who} is hiding {thing} {place}.",
                f"are you {doing}?",
                f"is {who} {doing} {now}?",
                f"{hello}, {to}, where is {thing}?",
                f"do you want to {want} {later}?",
                f"why is {who} {doing} {place}?",
                f"have you ever seen {thing} {place}?",
                f"{hello}, {to}, {want} {later}!",
                f"look, {thing} is {place}!",
                f"wait, {who} is {doing}!",
                f"hurry up, {to}, the storm is coming!",
                f"come on, we never {want} {later}!",
                f"stop {doing} {place}!",
                f"thank you for {doing} {now}!",
                f"there is {a(pick(('big', 'old', 'new', 'great')))} {pick(('map', 'knife', 'flag'))} {place}.",
            )
        )
    )


def generate(seed: int, train: int, test: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Rows to train on and held-out rows."""

    def make(rng: Random) -> tuple[str, str]:
        plain = sentence(rng)
        return plain, to_pirate(plain)

    return distinct(stream(NAME, seed), make, train, test, NAME)


def build(seed: int, train: int, test: int) -> Task:
    """The task; exact match, and chrF to tell near misses from none."""
    rows, held = generate(seed, train, test)
    return Task(
        name=NAME,
        about=ABOUT,
        train=rows,
        test=held,
        score_name="exact match",
        scorer=score_answers,
        suggested={"max_new_tokens": 48},
    )
