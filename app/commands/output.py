"""What a command gives back, and how it is printed: one JSON object, or text for a person."""

from __future__ import annotations

import json as json_module
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TextIO

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a command found: `value` for scripts, `text` for people, and the exit status."""

    value: dict[str, Any]
    text: str
    json: bool
    status: int = 0


def show(result: Result, out: TextIO) -> None:
    """Print a result on `out`, the real standard output."""
    text = json_module.dumps(plain(result.value), allow_nan=False) if result.json else result.text
    if text:
        print(text, file=out, flush=True)


def say(text: str) -> None:
    """One line on standard error: a note, or what went wrong."""
    print(text, file=sys.stderr, flush=True)


def plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns of text; the first row is the head, columns whose number is in `right` hold numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def size(n: float) -> str:
    """Bytes as people read them, in powers of 1000: "269 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" or n >= 99.5 else f"{n:.3g} {unit}"
        n /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds as people read them: "8 s", "2 min 40 s", "1 h 5 min"."""
    s = round(seconds)
    if s < 60:
        return f"{max(1, s)} s"
    if s < 3600:
        return f"{s // 60} min {s % 60} s" if s % 60 else f"{s // 60} min"
    return f"{s // 3600} h {s % 3600 // 60} min"


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"
