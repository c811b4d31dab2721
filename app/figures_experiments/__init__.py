"""Results of experiments to Plotly figures: `figure(result)`, for the page, the command line and notebooks.

    import plotly.graph_objects as go
    from app.figures_experiments import figure
    go.Figure(figure(lc.stored_result("rank")))

Every figure has a title, axes with units, what to see in a sentence and the numbers as a table (both in layout.meta),
the spread over seeds, and the paper's own numbers beside ours where the two can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from app.figures import Figure
from app.figures_experiments import costs, learning, matrices, rivals
from app.figures_experiments.panels import OURS, Panel, Paper, axis, build, categories, dots, plus_minus, unique, values
from lora_core.experiments import Result, find_experiment
from lora_core.experiments.experiment import Row

Drawing = Callable[[Sequence[Row], Paper], Figure]
DRAWN: dict[str, Drawing] = {
    "storage": costs.storage, "switch": costs.switch, "latency": costs.latency,
    "rank": learning.rank, "which": learning.which, "alpha": learning.alpha, "objective": learning.objective,
    "w-rank": matrices.w_rank, "subspace": matrices.subspace, "amplify": matrices.amplify,
    "truncate": matrices.truncate, "methods": rivals.methods, "generalises": rivals.generalises,
    "choose": rivals.choose, "forget": rivals.forget,
}  # fmt: skip
OTHER_ROWS = (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError, StopIteration)


def figure(result: Result) -> Figure:
    """The figure of a result; `plain` for an experiment without one of its own, or rows of another version of it."""
    try:
        return DRAWN[result.name](result.rows, find_experiment(result.name).paper)
    except OTHER_ROWS:
        return plain(result.rows)


def plain(rows: Sequence[Row]) -> Figure:
    """Points for what the rows hold first: their words as names, the first measured number as value."""
    words = [c for c in dict.fromkeys(c for r in rows for c in r) if any(isinstance(r.get(c), str) for r in rows)]
    numbers = [c for c in dict.fromkeys(c for r in rows for c in r) if c not in ("seed", *words)
               and all(isinstance(r.get(c, 0.0), (int, float)) for r in rows)
               and any(isinstance(r.get(c), float) for r in rows)]  # fmt: skip
    if not numbers:
        return build("The measurements", "There are no numbers to draw.", [Panel(data=[], x={}, y={})])
    groups: dict[str, list[float]] = {}
    for r in rows:
        if isinstance(r.get(numbers[0]), (int, float)):
            fixed = [str(r[c]) for c in words if c in r]
            fixed += [f"{c} {r[c]}" for c in r if isinstance(r[c], int) and c != "seed" and len(unique(rows, c)) > 1]
            groups.setdefault(", ".join(fixed) or "all", []).append(float(r[numbers[0]]))
    shown = list(groups.items())[:24]
    panel = Panel(data=dots(shown, numbers[0], OURS), y=categories([n for n, _ in shown]),
                  x=axis(numbers[0].replace("_", " "), values(shown)))  # fmt: skip
    table = [["", numbers[0].replace("_", " ")], *([n, plus_minus(v)] for n, v in groups.items())]
    return build("The measurements", "Dots: each seed; bars: 95 % interval of the mean.", [panel], table)
