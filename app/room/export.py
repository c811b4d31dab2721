"""The wall to take along: a notebook that draws its figures again (its table as CSV is `app.tables`')."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def notebook(rows: Sequence[Sequence[Any]], rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A notebook (nbformat 4.5) with the table, and for each round its question, guesses, curves and runs.

    rounds  {"question", "choices", "counts", "right", "say", "play": {"figure", "say"} or None,
            "runs": {"pareto", "losses", "spectra" and their sentences} or None}
    """
    cells = [
        text(["# What the room found\n", "\n", "All numbers are in this file: no server is needed to draw them."]),
        program([
            "import json\n", "\n", "import pandas as pd\n", "import plotly.graph_objects as go\n", "\n",
            f"rows = json.loads({literal(rows)})\n",
            "pd.DataFrame(rows[1:], columns=rows[0])",
        ]),
    ]  # fmt: skip
    for n, r in enumerate(rounds, 1):
        cells.append(text([f"## {n}. {markdown(r['question'])}\n", "\n", markdown(r["say"])]))
        bars = {"choices": r["choices"], "counts": r["counts"]}
        cells.append(program([
            f"guesses = json.loads({literal(bars)})\n",
            "bars = go.Bar(x=guesses['counts'], y=guesses['choices'], orientation='h')\n",
            "go.Figure(bars).update_layout(title='Guesses', xaxis_title='people', yaxis_autorange='reversed')",
        ]))  # fmt: skip
        for title, found, say in pictures(r):
            cells.append(text([f"### {title}\n", "\n", markdown(say)]))
            cells.append(program([
                f"figure = go.Figure(json.loads({literal(found)}))\n",
                f"figure.update_layout(title={title!r}, paper_bgcolor='white', height=460)",
            ]))  # fmt: skip
    return {"cells": [c | {"id": f"room-{i:02d}"} for i, c in enumerate(cells)], "nbformat": 4, "nbformat_minor": 5,
            "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                         "language_info": {"name": "python"}}}  # fmt: skip


def pictures(r: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    """(title, figure, sentence) of a round."""
    found: list[tuple[str, Any, str]] = []
    if play := r.get("play"):
        found.append(("Play on every device", play["figure"], play["say"]))
    if runs := r.get("runs"):
        names = (("pareto", "Held-out loss against size", "say"), ("losses", "Losses", "say_losses"),
                 ("spectra", "Spectra", "say_spectra"))  # fmt: skip
        found += [(title, runs[key], runs.get(say, "")) for key, title, say in names if runs.get(key)]
    return found


def literal(value: Any) -> str:
    """A value as the text of a Python string of JSON: whatever is in it stays data."""
    return repr(json.dumps(value, ensure_ascii=True, allow_nan=False, default=str))


def markdown(words: str) -> str:
    """Somebody's words as they stand: no HTML, no link and no heading is made of them."""
    words = words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for sign in "\\`*_{}[]()#+!|$~":
        words = words.replace(sign, f"\\{sign}")
    return words


def text(lines: Sequence[str]) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": list(lines)}


def program(lines: Sequence[str]) -> dict[str, Any]:
    return {"cell_type": "code", "metadata": {}, "source": list(lines), "outputs": [], "execution_count": None}
