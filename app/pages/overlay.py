"""Train's comparisons: what differs between the runs that lie over each other, and held-out loss against size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app import figures_train
from app.pages.lab import Lab, title
from app.pages.words import plural
from app.runs.run import Run, describe, difference

MOST = 200  # runs that are looked at
ENDED = ("done", "stopped")


def name(run: Run) -> str:
    return "recorded" if run.recorded else f"run {run.id}"


def comparable(run: Run, other: Run) -> bool:
    """Whether two losses are about the same tokens: same model, same rows."""
    a, b = run.request, other.request
    return (a.model, a.task, a.data, a.template) == (b.model, b.task, b.data, b.template)


def differs(run: Run, others: Sequence[Run]) -> dict[str, Any] | None:
    """{"names", "rows": [[setting, of each run …]]}: only the settings that differ, then what came of them.

    The open run comes first; None where nothing lies behind it.
    """
    if not others:
        return None
    rows: dict[str, list[str | None]] = {}
    here: dict[str, str] = {}
    for i, other in enumerate(others):
        for d in difference(run, other):
            rows.setdefault(d.label, [None] * len(others))[i] = d.other
            here[d.label] = d.this
    table = [[label, here[label], *(here[label] if v is None else v for v in values)] for label, values in rows.items()]
    every = [run, *others]
    table.append(["parameters", *(f"{n:,}" if (n := r.result.get("trainable")) else "–" for r in every)])
    table.append(["held-out loss", *(f"{r.loss:.2f}" if r.loss is not None and r.step else "–" for r in every)])
    return {"names": [name(r) for r in every], "rows": table}


def pareto(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """Held-out loss against trainable parameters, of all ended runs on the same rows as `run`; and the front of those
    that no other run beats in both."""
    run = lab.run(query.get("run"))
    known = [*lab.runs(MOST), *([r] if (r := lab.store.recorded()) else [])]
    points = [{"run": r.id, "name": name(r), "says": describe(r), "trainable": r.result["trainable"], "loss": r.loss}
              for r in known if r.status in ENDED and r.loss is not None and r.step and r.result.get("trainable")
              and comparable(run, r)]  # fmt: skip
    if not points:
        return {"run": run.id, "say": "No run on these rows has ended yet; each will be a point here."}
    on = front(points)
    answer: dict[str, Any] = {"run": run.id, "say": say(points, on, run), "front": on}
    answer["figure"] = figures_train.pareto(points, on, base=run.base_loss, open_=run.id)
    head = ["run", "settings", "trainable parameters", "held-out loss", "on the front"]
    answer["rows"] = [head, *([p["name"], p["says"], p["trainable"], p["loss"], p["run"] in on] for p in points)]
    return answer


def front(points: Sequence[Mapping[str, Any]]) -> list[int]:
    """The runs that no other run beats: none is as small or smaller and has a lower loss. By rising size."""
    found: list[int] = []
    best = float("inf")
    for p in sorted(points, key=lambda p: (p["trainable"], p["loss"], p["run"])):
        if p["loss"] < best:
            best = p["loss"]
            found.append(p["run"])
    return found


def say(points: Sequence[Mapping[str, Any]], on: Sequence[int], run: Run) -> str:
    """What the picture shows, in one sentence."""
    if len(points) == 1:
        return (f"One run on these rows so far: {points[0]['trainable']:,} parameters, loss {points[0]['loss']:.2f}. "
                "Train another rank or other matrices to have a second point.")  # fmt: skip
    here = next((p for p in points if p["run"] == run.id), None)
    text = f"{plural(len(on), 'run').capitalize()} of {len(points)} on the front: no other is as small and as good."
    if here is None:
        return text
    better = [p for p in points if p["trainable"] <= here["trainable"] and p["loss"] < here["loss"]]
    if not better:
        return f"{text} {title(run).capitalize()} is one of them."
    best = min(better, key=lambda p: p["trainable"])
    times = here["trainable"] / best["trainable"]
    size = "as many parameters" if times == 1 else f"{times:.2g} times fewer parameters"
    lower = here["loss"] - best["loss"]
    return f"{text} {title(run).capitalize()} is beaten by {best['name']}: {lower:.2f} lower with {size}."
