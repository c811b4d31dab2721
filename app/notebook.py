"""What notebooks have besides the library: a figure with its sentence, a guess, an experiment's answer."""

from __future__ import annotations

import html
from typing import Any

import ipywidgets as W
import plotly.graph_objects as go
from IPython.display import HTML, Markdown, display

from app.figures import Figure
from app.figures_experiments import figure as drawn
from lora_core.errors import UserError
from lora_core.experiments import find_experiment, result_here, stored_result
from lora_core.experiments.experiment import Result

LETTERS = "abc"


def titled(figure: Figure, title: str = "", height: int = 380) -> Figure:
    """The same figure with a title above it, in a size that suits a notebook."""
    layout = dict(figure["layout"])
    margin = {"l": 60, "r": 20, "t": 12, "b": 50, **layout.get("margin", {})}
    if title:
        layout["title"] = {"text": f"<b>{html.escape(title)}</b>", "x": 0, "xref": "paper", "y": 0.98,
                           "yref": "container", "yanchor": "top", "font": {"size": 17}}  # fmt: skip
        margin["t"] += 34
        if layout.get("legend", {}).get("yref") == "container":
            layout["legend"] = {**layout["legend"], "y": 1 - 36 / height}
            names = {t.get("name") or "" for t in figure["data"] if t.get("showlegend", True)}
            margin["t"] += 24 * (sum(len(n) + 6 for n in names) // 100)  # what does not fit into one line
    return {"data": figure["data"], "layout": layout | {"margin": margin, "height": height, "paper_bgcolor": "#ffffff"}}


def show(figure: Figure, title: str, see: str, *, height: int = 380) -> None:
    """Display a figure of app.figures or app.charts with its title, and below it one sentence: what to see."""
    display(go.Figure(titled(figure, title, height)))
    display(HTML(f"<p><em>{html.escape(see)}</em></p>"))


class Guess(W.VBox):
    """A question with answers to pick from, before the cell that answers it.

    ask = Guess("Which is larger?", "this", "that", right=1)      then, below the measurement: ask.reveal()

    right   the index of the right answer where it is certain; None where the measurement has to say it
    """

    def __init__(self, question: str, *answers: str, right: int | None = None) -> None:
        if len(answers) < 2 or (right is not None and not 0 <= right < len(answers)):
            raise UserError("a guess needs at least two answers, and `right` is the index of one of them")
        self.question, self.answers, self.right = question, answers, right
        options = [(f"{LETTERS[i]}  {a}", i) for i, a in enumerate(answers)]
        self.pick = W.RadioButtons(options=options, value=None, layout=W.Layout(width="auto"))
        heading = W.HTML(f"<b style='font-size:16px'>{html.escape(question)}</b>")
        super().__init__([heading, self.pick], layout=W.Layout(padding="6px 0"))

    @property
    def guessed(self) -> int | None:
        """The index of what was picked, or None."""
        return self.pick.value

    def reveal(self, right: int | None = None) -> None:
        """Say what was guessed and what is so; nothing can be picked after it."""
        right = self.right if right is None else right
        mine, self.pick.disabled = self.guessed, True
        said = "You made no guess" if mine is None else f"You guessed **{LETTERS[mine]}**, *{self.answers[mine]}*"
        if right is None:
            display(Markdown(f"{said}. Compare it with what was measured."))
            return
        hit = "" if mine is None else " Right." if mine == right else " It is otherwise."
        display(Markdown(f"{said}.{hit} The answer is **{LETTERS[right]}**: {self.answers[right]}."))


class Question(Guess):
    """The guess of one of the paper's questions, with its three answers: `Question("rank")`.

    `answer()` shows the paper's claim beside what was measured: on this machine if it was, else what ships.
    """

    def __init__(self, name: str) -> None:
        self.experiment = e = find_experiment(name)
        super().__init__(e.question, *e.choices)

    def result(self) -> Result | None:
        """What was measured here, else the stored result, else None."""
        name = self.experiment.name
        return result_here(name) or stored_result(name)

    def answer(self) -> None:
        """The paper's claim, the verdict on it and the numbers, or how to measure where nothing is stored yet."""
        e, found = self.experiment, self.result()
        self.pick.disabled = True
        lines = [f"**The paper (section {e.section}):** {e.claim}", ""]
        if self.guessed is not None:
            same = "the same as" if self.guessed == e.answer else "other than"
            lines[:0] = [f"You guessed **{LETTERS[self.guessed]}**, {same} the paper's answer.", ""]
        if found is None:
            lines.append(f"Nothing is stored for this yet. In a terminal: `lora-lab experiment run {e.name} --quick`")
        else:
            seeds = f"{len(found.seeds)} seeds" if len(found.seeds) > 1 else "one seed"
            kind = "a quick run" if found.quick else "a full run"
            how = f"{kind} on {found.model}, {seeds}, {found.seconds / 60:.0f} min: `{found.command}`"
            lines += [f"**Measured here: {found.verdict}.** {found.sentence}", "", f"*{how}*"]
        display(Markdown("\n".join(lines)))
        if found is not None:
            figure = drawn(found)
            layout, meta = figure["layout"], figure["layout"]["meta"]
            height = max(400, 300 * meta["rows"])
            _closer(layout, meta["rows"], 90 / height)
            show(figure, layout.pop("title")["text"], meta["say"], height=height)


def _closer(layout: dict[str, Any], rows: int, gap: float) -> None:
    """Rows of panels with this share of the height between them, enough for their titles and ticks."""
    axes = [a for n, a in layout.items() if n.startswith("yaxis")]
    tops = sorted({a["domain"][1] for a in axes}, reverse=True)
    high = (1 - gap * (rows - 1)) / rows
    for a in axes if rows > 1 else ():
        top = 1 - tops.index(a["domain"][1]) * (high + gap)
        a["domain"] = [max(0.0, top - high), top]


def rows_of(name: str, **where: Any) -> list[dict[str, Any]]:
    """The rows of a result that is here or stored, whose columns have these values; none where there is no result."""
    try:
        found = result_here(name) or stored_result(name)
    except UserError:  # a name that this version does not know
        return []
    return [dict(r) for r in found.rows if all(r.get(k) == v for k, v in where.items())] if found else []
