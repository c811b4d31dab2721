"""A link as a QR code: a path of squares for the page, and blocks for the terminal. Nothing is asked of anybody."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=8)
def code(text: str) -> dict[str, Any]:
    """{"size", "path"}: an SVG path of unit squares within `size` × `size`, the quiet zone of four squares included."""
    import segno

    rows = [list(row) for row in segno.make(text, error="m", micro=False).matrix_iter(scale=1, border=4)]
    path = []
    for y, row in enumerate(rows):
        x = 0
        while x < len(row):
            width = 0
            while x + width < len(row) and row[x + width]:
                width += 1
            if width:
                path.append(f"M{x} {y}h{width}v1h-{width}z")
            x += width or 1
    return {"size": len(rows), "path": "".join(path)}


def blocks(text: str) -> str:
    """The same for a terminal, two squares above each other in one letter."""
    import segno

    out = io.StringIO()
    segno.make(text, error="m", micro=False).terminal(out=out, compact=True, border=2)
    return out.getvalue()
