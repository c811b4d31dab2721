"""What the presenter asks: one of the paper's questions, a preset of Play, or words of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lora_core.errors import UserError

Kind = Literal["card", "play", "own"]
Act = Literal["none", "play", "grid"]
ACTS = ("none", "play", "grid")
PLAYS = ("first", "bzero", "scale", "lowrank", "full", "noise", "swap", "cut")  # the presets of the tab Play
LONGEST, LONGEST_CHOICE = 300, 120
FEWEST, MOST = 2, 5


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of the presenter's.

    kind     where it is from; name: of the card or the preset
    choices  two to five answers; right: which one it is, None where only the measurement says it
    act      what Run does: nothing, Play on every device, or cells of the grid on the real model
    """

    kind: Kind
    text: str
    choices: tuple[str, ...]
    right: int | None = None
    name: str = ""
    act: Act = "none"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"choices": list(self.choices)}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Question:
        """Inverse of `to_dict`."""
        return cls(**{**d, "choices": tuple(d["choices"])})


def asked(given: Mapping[str, Any]) -> Question:
    """The question of a request {"kind", "name" or "text" and "choices", "right", "act"}; UserError for any other.

    A card's words are the experiment's own. Those of a preset come from the page, which has them.
    """
    kind, act = given.get("kind"), given.get("act", "none")
    if act not in ACTS:
        raise UserError(f"act is {act!r}; Run does one of {', '.join(ACTS)}")
    if kind == "card":
        from lora_core.experiments import find_experiment

        e = find_experiment(str(given.get("name", "")))
        if act == "play":
            raise UserError("a card of Questions runs on the real model or not at all; Play has questions of its own")
        return Question(kind="card", name=e.name, text=e.question, choices=tuple(e.choices), right=e.answer, act=act)
    if kind == "play":
        name = given.get("name")
        if name not in PLAYS:
            raise UserError(f"name is {name!r}; the presets of Play are {', '.join(PLAYS)}")
        return Question(kind="play", name=str(name), act="play", **_words(given))
    if kind == "own":
        if act == "play":
            raise UserError("a question of your own runs on the real model or not at all; Play has its own")
        return Question(kind="own", act=act, **_words(given))
    raise UserError(f"kind is {kind!r}; a question is a card, a preset of Play, or one of your own")


def _words(given: Mapping[str, Any]) -> dict[str, Any]:
    text = line(given.get("text"), LONGEST, "the question")
    choices = given.get("choices")
    if not isinstance(choices, (list, tuple)) or not FEWEST <= len(choices) <= MOST:
        n = len(choices) if isinstance(choices, (list, tuple)) else "none"
        raise UserError(f"a question has {FEWEST} to {MOST} choices; {n} given")
    words = tuple(line(c, LONGEST_CHOICE, f"choice {i + 1}") for i, c in enumerate(choices))
    if len(set(words)) < len(words):
        raise UserError("two choices have the same words; each needs its own")
    right = given.get("right")
    if right is not None and (isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(words)):
        raise UserError(f"right is {right!r}; it is the number of a choice from 0, or nothing")
    return {"text": text, "choices": words, "right": right}


def line(text: Any, most: int, what: str) -> str:
    """One line of text without control characters. UserError where it is empty, too long, or no text."""
    if not isinstance(text, str):
        raise UserError(f"{what} is {text!r:.40}; it must be text")
    clean = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if not clean:
        raise UserError(f"{what} is empty; write some words")
    if len(clean) > most:
        raise UserError(f"{what} has {len(clean)} characters; at most {most} are kept")
    return clean
