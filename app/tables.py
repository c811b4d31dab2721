"""Tables as CSV for spreadsheets: numbers stay numbers, and no text becomes a formula."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import Any

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet takes a cell that begins so for one
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.I)


def as_csv(rows: Sequence[Sequence[Any]]) -> str:
    """Lines of comma-separated cells as RFC 4180 has them; None is an empty one.

    A text that begins like a formula gets an apostrophe.
    """
    out = io.StringIO()
    csv.writer(out).writerows([[cell(v) for v in row] for row in rows])
    return out.getvalue()


def cell(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(FORMULA) and not NUMBER.fullmatch(value):
        return f"'{value}"
    return value
