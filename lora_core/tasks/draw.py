"""Drawing distinct examples from a grammar, the same ones in every process for the same seed."""

from __future__ import annotations

import random
from collections.abc import Callable

from lora_core.errors import UserError
from lora_core.tasks.task import Row


def stream(task: str, seed: int) -> random.Random:
    """Random numbers of one task and seed. Seeding with text goes through SHA-512, so no process differs."""
    return random.Random(f"lora-lab/{task}/{seed}")


def distinct(
    rng: random.Random, make: Callable[[random.Random], tuple[str, str]], train: int, test: int, task: str
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """`train` and `test` rows with prompts that all differ, drawn by `make` -> (prompt, completion).

    Raises UserError when the grammar does not seem to have that many.
    """
    found: dict[str, str] = {}
    misses = 0
    while len(found) < train + test:
        prompt, completion = make(rng)
        misses = 0 if prompt not in found else misses + 1
        if misses > 300:
            raise UserError(f"{task} has not enough different examples for {train:,} + {test:,} rows; ask for fewer")
        found.setdefault(prompt, completion)
    pairs = list(found.items())
    return numbered(pairs[:train]), numbered(pairs[train:])


def numbered(pairs: list[tuple[str, str]]) -> tuple[Row, ...]:
    """Rows with their place as the line number."""
    return tuple(Row(prompt, completion, i) for i, (prompt, completion) in enumerate(pairs, 1))


def a(phrase: str) -> str:
    """The phrase with its indefinite article, by the sound it begins with."""
    word = phrase.split()[0].lower()
    silent = word.startswith(("hour", "honest", "heir"))
    consonant = word.startswith(("uni", "use", "euro", "one"))
    vowel = (word[0] in "aeiou" and not consonant) or silent or word.startswith(("8", "11", "18"))
    return f"{'an' if vowel else 'a'} {phrase}"


def capital(sentence: str) -> str:
    """With a capital first letter, the rest as it is."""
    return sentence[:1].upper() + sentence[1:]
