"""new-language: English -> Ovarni, a language that nobody speaks.

Its words follow their own sound pattern and its grammar is unlike English, so nothing of it was in pre-training:
a model has to learn some sixty words and these rules from the rows alone.

- The verb comes first, then subject, object, place: "the girl saw a dog" is saw-girl-dog.
- A verb ends in its tense and in the class of its subject. "I", "you" and "they" are endings, not words.
- Nouns are people, animals or things; the definite ending ("the") and the endings of adjectives follow that class.
- Plural: the first syllable is said twice. After a number a noun stays singular.
- An object ends in -u. Adjectives and numbers follow the noun. Prepositions follow what they belong to.
- "Not" is a word before the verb, a question ends with a word of its own.

The language is always the same, whatever the seed; the seed picks the sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from lora_core.tasks.draw import a, capital, distinct, stream
from lora_core.tasks.scores import chrf, exact_match, group
from lora_core.tasks.task import Row, Task

NAME = "new-language"
ABOUT = "An English sentence, and the same in Ovarni, an invented language with words and grammar of its own."

PEOPLE, ANIMALS, THINGS = "people", "animals", "things"
# singular: (plural, class)
NOUNS = {
    "farmer": ("farmers", PEOPLE),
    "girl": ("girls", PEOPLE),
    "king": ("kings", PEOPLE),
    "sailor": ("sailors", PEOPLE),
    "doctor": ("doctors", PEOPLE),
    "child": ("children", PEOPLE),
    "woman": ("women", PEOPLE),
    "hunter": ("hunters", PEOPLE),
    "dog": ("dogs", ANIMALS),
    "wolf": ("wolves", ANIMALS),
    "bird": ("birds", ANIMALS),
    "horse": ("horses", ANIMALS),
    "cat": ("cats", ANIMALS),
    "snake": ("snakes", ANIMALS),
    "bear": ("bears", ANIMALS),
    "apple": ("apples", THINGS),
    "knife": ("knives", THINGS),
    "lamp": ("lamps", THINGS),
    "book": ("books", THINGS),
    "stone": ("stones", THINGS),
    "cup": ("cups", THINGS),
    "house": ("houses", THINGS),
    "river": ("rivers", THINGS),
    "forest": ("forests", THINGS),
    "bridge": ("bridges", THINGS),
    "tree": ("trees", THINGS),
    "mountain": ("mountains", THINGS),
}
MOVABLE = ("apple", "knife", "lamp", "book", "stone", "cup")
# what can be where
PLACES = {
    "house": ("in", "near", "behind"),
    "river": ("near",),
    "forest": ("in", "near", "behind"),
    "bridge": ("on", "under", "near"),
    "tree": ("under", "near", "behind"),
    "mountain": ("on", "near", "behind"),
}
# base: (with she, past, who does it, to what; no object: ())
ANYBODY = (PEOPLE, ANIMALS)
VERBS: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "see": ("sees", "saw", ANYBODY, (PEOPLE, ANIMALS, THINGS)),
    "find": ("finds", "found", ANYBODY, (PEOPLE, ANIMALS, THINGS)),
    "follow": ("follows", "followed", ANYBODY, (PEOPLE, ANIMALS)),
    "fear": ("fears", "feared", ANYBODY, (PEOPLE, ANIMALS)),
    "hear": ("hears", "heard", ANYBODY, (PEOPLE, ANIMALS)),
    "love": ("loves", "loved", (PEOPLE,), (PEOPLE, ANIMALS)),
    "carry": ("carries", "carried", (PEOPLE,), (THINGS,)),
    "hide": ("hides", "hid", (PEOPLE,), (THINGS,)),
    "buy": ("buys", "bought", (PEOPLE,), (ANIMALS, THINGS)),
    "paint": ("paints", "painted", (PEOPLE,), (PEOPLE, ANIMALS, THINGS)),
    "sleep": ("sleeps", "slept", ANYBODY, ()),
    "wait": ("waits", "waited", ANYBODY, ()),
    "run": ("runs", "ran", ANYBODY, ()),
    "sing": ("sings", "sang", (PEOPLE,), ()),
}
ADJECTIVES = {
    "old": (PEOPLE, ANIMALS, THINGS),
    "small": (PEOPLE, ANIMALS, THINGS),
    "big": (ANIMALS, THINGS),
    "white": (ANIMALS, THINGS),
    "black": (ANIMALS, THINGS),
    "red": (THINGS,),
    "heavy": (THINGS,),
    "young": (PEOPLE, ANIMALS),
    "happy": (PEOPLE, ANIMALS),
    "tired": (PEOPLE, ANIMALS),
}
NUMBERS = ("two", "three", "four")
PREPOSITIONS = ("in", "near", "behind", "on", "under")

TENSE = {"past": "or", "present": "ai", "future": "eth"}
PERSON = {"I": "mo", "you": "shi", "they": "zul", PEOPLE: "na", ANIMALS: "ke", THINGS: "vo"}
DEFINITE = {PEOPLE: "en", ANIMALS: "ok", THINGS: "ash"}
AGREES = {PEOPLE: "il", ANIMALS: "ur", THINGS: "ov"}
OBJECT, NOT, QUESTION, BE = "u", "ta", "zhe", "hos"


def _lexicon() -> dict[str, str]:
    """A word for each English one: two syllables, none like another, always the same."""
    rng = Random("Ovarni")
    onsets = "k t p m n l r v z zh kw tl ng th dr".split()
    vowels, codas = "a e i o u".split(), ["", "", "n", "l", "r", "sh", "k"]
    words: dict[str, str] = {}
    for english in (*NOUNS, *VERBS, *ADJECTIVES, *NUMBERS, *PREPOSITIONS):
        word = ""
        while not word or word in words.values():
            first = rng.choice(onsets) + rng.choice(vowels)
            word = f"{first}-{rng.choice(onsets)}{rng.choice(vowels)}{rng.choice(codas)}"
        words[english] = word
    return words


# The hyphen marks the end of the first syllable, which the plural repeats; it is not written.
LEXICON = _lexicon()


@dataclass(frozen=True, kw_only=True)
class Phrase:
    """A noun with what belongs to it. `count`: "one", "many", or a number word."""

    noun: str
    count: str = "one"
    definite: bool = True
    adjective: str | None = None

    @property
    def kind(self) -> str:
        return NOUNS[self.noun][1]

    def english(self) -> str:
        noun = self.noun if self.count == "one" else NOUNS[self.noun][0]
        words = " ".join(w for w in (self.count if self.count in NUMBERS else "", self.adjective, noun) if w)
        if self.definite:
            return f"the {words}"
        return a(words) if self.count == "one" else words

    def ovarni(self, *, of_verb: bool = False) -> str:
        first, second = LEXICON[self.noun].split("-")
        noun = (first if self.count == "many" else "") + first + second
        noun += (DEFINITE[self.kind] if self.definite else "") + (OBJECT if of_verb else "")
        words = [noun]
        if self.adjective:
            words.append(_word(self.adjective) + AGREES[self.kind])
        if self.count in NUMBERS:
            words.append(_word(self.count))
        return " ".join(words)


def _word(english: str) -> str:
    return LEXICON[english].replace("-", "")


def _phrase(rng: Random, nouns: Sequence[str], *, adjective: float = 0.4) -> Phrase:
    noun = rng.choice(list(nouns))
    fitting = [word for word, kinds in ADJECTIVES.items() if NOUNS[noun][1] in kinds]
    return Phrase(
        noun=noun,
        count=rng.choices(("one", "many", rng.choice(NUMBERS)), weights=(6, 3, 2))[0],
        definite=rng.random() < 0.65,
        adjective=rng.choice(fitting) if rng.random() < adjective else None,
    )


def _of(kinds: Sequence[str]) -> list[str]:
    """Nouns of these classes; of things only those that a person can handle."""
    return [noun for noun, (_, kind) in NOUNS.items() if kind in kinds and (kind != THINGS or noun in MOVABLE)]


def sentence(rng: Random) -> tuple[str, str]:
    """(English, Ovarni) of one sentence."""
    tense = rng.choice(list(TENSE))
    form = rng.choices(("plain", "not", "question"), weights=(5, 2, 2))[0]
    if rng.random() < 0.15:
        return _is(rng, tense, form)
    verb = rng.choice(list(VERBS))
    _, _, doers, objects = VERBS[verb]
    pronoun = rng.choice(("I", "you", "they")) if rng.random() < 0.25 else None
    subject = None if pronoun else _phrase(rng, _of(doers))
    thing = _phrase(rng, [n for n in _of(objects) if subject is None or n != subject.noun]) if objects else None
    place = rng.choice(list(PLACES)) if not objects or rng.random() < 0.4 else None
    where = (rng.choice(PLACES[place]), _phrase(rng, [place], adjective=0.2)) if place else None
    if where and where[1].count in NUMBERS:
        where = (where[0], Phrase(noun=where[1].noun, count="many"))

    who = pronoun or (subject.english() if subject else "")
    plural = pronoun is not None or (subject is not None and subject.count != "one")
    tail = " ".join(
        p for p in (thing.english() if thing else "", f"{where[0]} {where[1].english()}" if where else "") if p
    )
    english = _english(who, verb, tail, tense, form, plural)

    stem = _word(verb) + TENSE[tense] + PERSON[pronoun or (subject.kind if subject else PEOPLE)]
    words = [NOT if form == "not" else "", stem, subject.ovarni() if subject else ""]
    words += [thing.ovarni(of_verb=True) if thing else "", f"{where[1].ovarni()} {_word(where[0])}" if where else ""]
    return english, _close(words, form)


def _english(who: str, verb: str, tail: str, tense: str, form: str, plural: bool) -> str:
    third, past = VERBS[verb][0], VERBS[verb][1]
    helper = {"past": "did", "present": "do" if plural else "does", "future": "will"}[tense]
    if form == "question":
        return capital(f"{helper} {who} {verb} {tail}?")
    if form == "not":
        return capital(f"{who} {helper} not {verb} {tail}.")
    said = {"past": past, "present": verb if plural else third, "future": f"will {verb}"}[tense]
    return capital(f"{who} {said} {tail}.")


def _is(rng: Random, tense: str, form: str) -> tuple[str, str]:
    """ "The stones are heavy": a verb of being, then the subject, then the adjective with its ending."""
    drawn = _phrase(rng, list(NOUNS), adjective=0.0)
    adjective = rng.choice([word for word, kinds in ADJECTIVES.items() if drawn.kind in kinds])
    subject = Phrase(noun=drawn.noun, count=drawn.count)
    many = subject.count != "one"
    be = {"past": "were" if many else "was", "present": "are" if many else "is", "future": "will"}[tense]
    rest = f"be {adjective}" if tense == "future" else adjective
    who = subject.english()
    english = {
        "plain": f"{who} {be} {rest}.",
        "not": f"{who} {be} not {rest}.",
        "question": f"{be} {who} {rest}?",
    }[form]
    stem = BE + TENSE[tense] + PERSON[subject.kind]
    words = [NOT if form == "not" else "", stem, subject.ovarni(), _word(adjective) + AGREES[subject.kind]]
    return capital(english), _close(words, form)


def _close(words: Sequence[str], form: str) -> str:
    ending = f" {QUESTION}?" if form == "question" else "."
    return capital(" ".join(w for w in words if w) + ending)


def score(predictions: Sequence[str], rows: Sequence[Row], known: Sequence[Row]) -> dict[str, float]:
    """chrF first, since it moves long before a whole sentence is right; then exact match."""
    groups = group(predictions, rows, known)
    texts, references = [g[1] for g in groups], [g[2] for g in groups]
    return {"chrF": chrf(texts, references), "exact match": exact_match(texts, references)}


def generate(seed: int, train: int, test: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Rows to train on and held-out rows."""
    return distinct(stream(NAME, seed), sentence, train, test, NAME)


def build(seed: int, train: int, test: int) -> Task:
    """The task; chrF and exact match."""
    rows, held = generate(seed, train, test)
    return Task(
        name=NAME,
        about=ABOUT,
        train=rows,
        test=held,
        score_name="chrF",
        scorer=score,
        suggested={"max_new_tokens": 64},
    )
