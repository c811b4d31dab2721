"""What goes wrong because of what the user gave: one clear line, never a traceback.

Every such error says what was given, what is possible and, where there is one, the nearest match. The command line
turns a `UserError` into exit status 2, the page into a sentence beside the control that caused it.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from typing import Any, TypeGuard

MOST = 20  # names that an error lists
LARGEST = sys.float_info.max
LONGEST, LONGEST_NAME = 1000, 80  # characters of a sentence, and of a name in it


class UserError(ValueError):
    """The user's input cannot be used. `str(error)` is a whole sentence that can be shown as it is.

    What was given stands in it, and may be anything: of a very long sentence the middle is left out, and what is no
    character (half of a surrogate pair) is replaced.
    """

    def __init__(self, text: str) -> None:
        super().__init__(shortened(text, LONGEST))


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters, all of which can be written down."""
    if len(text) > most:
        end = most // 3
        text = f"{text[: most - end - 3]} … {text[-end:]}"
    return text.encode("utf-8", "replace").decode()


def is_real(value: Any, low: float = -LARGEST, high: float = LARGEST) -> TypeGuard[int | float]:
    """Whether a value is a number (no truth value, no NaN) within its bounds, and so one that fits into a float: JSON
    has whole numbers of any length."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def nearest(given: str, possible: Iterable[str]) -> str | None:
    """The entry of `possible` that `given` was probably meant to be, or None. Upper and lower case do not matter."""
    folded: dict[str, str] = {}
    for name in possible:
        folded.setdefault(name.casefold(), name)
    wanted = given.strip().casefold()
    close = difflib.get_close_matches(wanted, folded, n=1, cutoff=0.5)
    if close:
        return folded[close[0]]
    # difflib scores "sent" against "sentiment" and "q_proj" against "q" low, yet one begins with the other.
    longer = [name for key, name in folded.items() if len(wanted) >= 2 and key.startswith(wanted)]
    shorter = sorted((name for key, name in folded.items() if key and wanted.startswith(key)), key=len)
    return longer[0] if longer else shorter[-1] if shorter else None


def unknown(kind: str, given: str, possible: Iterable[str], where: str = "") -> UserError:
    """An error for a name that does not exist, to be raised by the caller.

    `unknown("matrix", "qproj", ["q", "k"], "in LlamaForCausalLM")` reads
    ``no matrix 'qproj' in LlamaForCausalLM; possible: q k (did you mean 'q'?)``.
    """
    names = [shortened(name, LONGEST_NAME) for name in possible]
    given = shortened(given, LONGEST_NAME)
    place = f" {where}" if where else ""
    more = f" … ({len(names) - MOST} more)" if len(names) > MOST else ""
    choice = f"; possible: {' '.join(names[:MOST])}{more}" if names else "; there are none"
    match = nearest(given, names)
    hint = f" (did you mean '{match}'?)" if match is not None else ""
    return UserError(f"no {kind} '{given}'{place}{choice}{hint}")
