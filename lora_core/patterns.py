"""PEFT's names of modules, which are regular expressions from a stranger's file, matched in bounded time.

Python's `re` tries one way after the other, and a pattern of thirty characters can have it try for ever. Here all ways
are followed at once: every part of a pattern takes a set of places in the name to the set of places behind it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from re import _constants as C  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from lora_core.errors import UserError

LONGEST, LONGEST_NAME = 1000, 500  # characters of a pattern, and of a name that it is tried on
DEEPEST = 20  # brackets within brackets
SECONDS = 2.0  # of the processor, for all names of one adapter
CATEGORIES: dict[Any, Callable[[str], bool]] = {
    C.CATEGORY_DIGIT: str.isdecimal,
    C.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    C.CATEGORY_SPACE: str.isspace,
    C.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    C.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    C.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}
REPEATS = (C.MAX_REPEAT, C.MIN_REPEAT)
Places = frozenset[int]


class TooInvolved(ValueError):
    """A pattern with parts that names have no need of."""


@lru_cache(maxsize=8192)
def compiled(pattern: str) -> Any:
    """The pattern's parts. Raises TooInvolved, or re.error for what is no pattern."""
    if len(pattern) > LONGEST:
        raise TooInvolved
    try:
        tree = _parser.parse(pattern)
        if tree.state.flags & ~re.UNICODE:
            raise TooInvolved
        _check(tree, 0)
    except RecursionError:
        raise TooInvolved from None
    return tree


def _check(items: Any, repeats: int, depth: int = 0) -> None:
    if depth > DEEPEST:
        raise TooInvolved
    for op, value in items:
        if op in REPEATS:
            low, high, inner = value
            deeper = repeats + (high is C.MAXREPEAT or high > 1)
            if deeper > 1:
                raise TooInvolved
            _check(inner, deeper, depth + 1)
        elif op is C.BRANCH:
            for inner in value[1]:
                _check(inner, repeats, depth + 1)
        elif op is C.SUBPATTERN and not value[1] and not value[2]:
            _check(value[3], repeats, depth + 1)
        elif op in (C.ASSERT, C.ASSERT_NOT) and value[0] == 1 and not repeats:
            _check(value[1], 0, depth + 1)
        elif op is C.AT and value in (C.AT_BEGINNING, C.AT_END, C.AT_BEGINNING_STRING, C.AT_END_STRING):
            pass
        elif op not in (C.LITERAL, C.NOT_LITERAL, C.ANY, C.IN):
            raise TooInvolved


def matches(pattern: str, name: str, anywhere: bool = False) -> bool:
    """Whether a pattern is all of a name; with `anywhere`, of it or of what follows one of its dots."""
    starts = {0, *(i + 1 for i, c in enumerate(name) if c == ".")} if anywhere else {0}
    return len(name) in _behind(compiled(pattern), name, frozenset(starts))


def _behind(items: Any, text: str, places: Places) -> Places:
    """Where the text may go on behind these parts, when they begin at any of the places."""
    for op, value in items:
        if not places:
            break
        places = _step(op, value, text, places)
    return places


def _step(op: Any, value: Any, text: str, places: Places) -> Places:
    n = len(text)
    if op is C.BRANCH:
        return frozenset(i for inner in value[1] for i in _behind(inner, text, places))
    if op is C.SUBPATTERN:
        return _behind(value[3], text, places)
    if op in REPEATS:
        low, high, inner = value
        return _repeated(low, high, inner, text, places)
    if op is C.AT:
        return places & {0 if value in (C.AT_BEGINNING, C.AT_BEGINNING_STRING) else n}
    if op in (C.ASSERT, C.ASSERT_NOT):
        return frozenset(i for i in places if bool(_behind(value[1], text, frozenset({i}))) == (op is C.ASSERT))
    return frozenset(i + 1 for i in places if i < n and _is(op, value, text[i]))


def _repeated(low: int, high: Any, inner: Any, text: str, places: Places) -> Places:
    low = min(low, len(text) + 1)  # more than that changes nothing
    reached = places if low == 0 else frozenset()
    count = 0
    while places and (high is C.MAXREPEAT or count < high):
        places, count = _behind(inner, text, places), count + 1
        if count >= low:
            places = places - reached
            reached |= places
    return reached


def _is(op: Any, value: Any, c: str) -> bool:
    if op is C.ANY:
        return c != "\n"
    if op is C.IN:
        negated = value[0][0] is C.NEGATE
        return any(_is(kind, inner, c) for kind, inner in value[negated:]) != negated
    if op is C.RANGE:
        return value[0] <= ord(c) <= value[1]
    if op is C.CATEGORY:
        return CATEGORIES[value](c)
    return (ord(c) == value) == (op is C.LITERAL)


class Names:
    """The names in one adapter's configuration, each looked at once before the first is matched."""

    def __init__(self, file: Path, config: Mapping[str, Any]) -> None:
        self.file, self.config, self.left = file, config, SECONDS
        targets = config.get("target_modules")
        for p in [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {}),
                  *([targets] if isinstance(targets, str) else [])]:  # fmt: skip
            self._compiled(p)

    def target(self, path: str) -> bool:
        """Whether `target_modules` names a module."""
        targets = self.config.get("target_modules") or []
        if isinstance(targets, str):
            return targets == "all-linear" or self._matches(targets, path, False)
        return any(path == t or path.endswith(f".{t}") for t in targets)

    def value(self, setting: str, name: str) -> Any:
        """PEFT's rule: of the first pattern that is the name or a dotted end of it (a leading ^ means the whole), or
        the setting for all."""
        for p, value in (self.config.get(f"{setting}_pattern") or {}).items():
            if self._matches(p, name, True):
                return value
        return self.config["r" if setting == "rank" else "lora_alpha"]

    def _matches(self, pattern: str, name: str, anywhere: bool) -> bool:
        if len(name) > LONGEST_NAME:
            raise UserError(
                f"{self.file.parent}: a module's name has {len(name):,} characters; {LONGEST_NAME} are read"
            )
        began = time.thread_time()
        found = matches(pattern, name, anywhere)
        self.left -= time.thread_time() - began
        if self.left < 0:
            raise self._involved(pattern)
        return found

    def _compiled(self, pattern: str) -> None:
        try:
            compiled(pattern)
        except TooInvolved:
            raise self._involved(pattern) from None
        except (re.error, OverflowError, ValueError) as error:
            raise UserError(f"{self.file}: {pattern[:60]!r} is no pattern: {error}") from None

    def _involved(self, pattern: str) -> UserError:
        return UserError(f"{self.file}: the pattern {pattern[:60]!r} is too involved for a name")
