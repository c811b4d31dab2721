"""Figures of the Train tab besides the loss: the spectrum of one ΔW as it grows, and held-out loss against size.

As in figures.py a figure is a plain dictionary in the light theme's colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from app.figures import BASE, CARD, EDGE, INK, MUTED, TEMPLATE, WARM, WARM_FILL, Figure, label, plain, tick

LINES = 16  # directions that are drawn


def film(steps: Sequence[int], sigma: Sequence[Sequence[float]], *, last: int = 0, revision: str = "") -> Figure:
    """Left each singular value of one ΔW over the steps, right all of them at one step, on one axis.

    steps   of the pictures; sigma: for each of them the singular values, largest first, in the units of the weights
    last    the run's last step, so that the axis stands still while it trains

    The page's slider moves the cursor (the first shape) and the points (the last trace) to another picture.
    """
    n = min(LINES, max((len(s) for s in sigma), default=0))
    x = list(range(1, n + 1))
    top = 1.08 * max((s[0] for s in sigma if s), default=0.0) or 1.0
    data: list[dict[str, Any]] = [
        {"x": list(steps), "y": [s[i] if i < len(s) else None for s in sigma], "mode": "lines", "type": "scatter",
         "name": f"σ{i + 1}", "line": {"color": WARM_FILL, "width": 2.5 if i == 0 else 1.5},
         "opacity": round(1.0 - 0.72 * i / max(1, n), 3),
         "hovertemplate": f"direction {i + 1}<br>step %{{x}}: σ = %{{y:.3g}}<extra></extra>"}
        for i in range(n)]  # fmt: skip
    now = [*sigma[-1][:n]] if sigma else []
    data.append({"x": x, "y": now, "xaxis": "x2", "mode": "markers", "type": "scatter", "name": "at the end",
                 "marker": {"size": 9 if n <= 8 else 7, "color": CARD, "line": {"color": EDGE, "width": 1.5}},
                 "hoverinfo": "skip"})  # fmt: skip
    data.append({"x": x, "y": now, "xaxis": "x2", "mode": "markers+lines", "type": "scatter", "name": "σ",
                 "marker": {"size": 9 if n <= 8 else 7, "color": WARM_FILL},
                 "line": {"color": WARM_FILL, "width": 1.5},
                 "hovertemplate": "direction %{x}: σ = %{y:.3g}<extra></extra>"})  # fmt: skip
    end = max([last, *steps], default=1) or 1
    at = steps[-1] if steps else 0
    return {
        "data": data,
        "layout": {
            "template": TEMPLATE,
            "uirevision": revision or "film",
            "margin": {"l": 56, "r": 8, "t": 8, "b": 44},
            "xaxis": {"title": {"text": "step"}, "range": [-0.01 * end, 1.02 * end], "domain": [0, 0.6], "nticks": 5},
            "xaxis2": {"title": {"text": "direction"}, "range": [0.4, n + 0.6], "domain": [0.66, 1],
                       "dtick": tick(3 * n), "tickangle": 0},
            "yaxis": {"title": {"text": "singular value σ"}, "range": [-0.02 * top, top], "nticks": 6},
            "shapes": [{"type": "line", "xref": "x", "x0": at, "x1": at, "yref": "paper", "y0": 0, "y1": 1,
                        "line": {"color": INK, "width": 1.5, "dash": "dot"}}],
        },
    }  # fmt: skip


def pareto(points: Sequence[dict[str, Any]], front: Sequence[int], *, base: float | None, open_: int) -> Figure:
    """Held-out loss against trainable parameters (on a logarithmic axis), with the front of runs that none beats.

    points  {"run", "name", "says", "trainable", "loss"} of each run; front: the runs on it, by rising size
    base    the base model's loss, drawn as a line across; open_: the run that is marked
    """
    by_run = {p["run"]: p for p in points}
    line = [by_run[r] for r in front]
    inner = [p for p in points if p["run"] not in front]

    def dots(some: Sequence[dict[str, Any]], name: str, marker: dict[str, Any]) -> dict[str, Any]:
        return {"x": [p["trainable"] for p in some], "y": [p["loss"] for p in some], "mode": "markers",
                "type": "scatter", "name": name, "marker": marker, "customdata": [p["run"] for p in some],
                "text": [plain(f"{p['name']}: {p['says']}") for p in some],
                "hovertemplate": "%{text}<br>%{x:,} parameters, loss %{y:.3f} nats<extra></extra>"}  # fmt: skip

    data = [
        {"x": [p["trainable"] for p in line], "y": [p["loss"] for p in line], "mode": "lines", "type": "scatter",
         "line": {"color": WARM_FILL, "width": 2, "shape": "hv"}, "hoverinfo": "skip", "name": "front"},
        dots(inner, "beaten by another", {"size": 11, "color": CARD, "line": {"color": EDGE, "width": 2}}),
        dots(line, "on the front", {"size": 13, "color": WARM_FILL}),
    ]  # fmt: skip
    here = [p for p in points if p["run"] == open_]
    data.append(dots(here, "open", {"size": 21, "color": "rgba(0,0,0,0)", "line": {"color": WARM, "width": 2}}))
    annotations = [label(p["trainable"], p["loss"], plain(p["name"]), yshift=-18, size=14, color=MUTED) for p in line]
    for a, p in zip(annotations, line, strict=True):  # Plotly puts annotations on a logarithmic axis by exponent
        a["x"] = exponent(p["trainable"])
    values = [p["loss"] for p in points] + ([base] if base is not None else [])
    pad = 0.12 * (max(values) - min(values)) or 0.2
    shapes: list[dict[str, Any]] = []
    if base is not None:
        shapes.append({"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": base, "y1": base, "layer": "below",
                       "line": {"color": BASE, "width": 1.5, "dash": "dash"}})  # fmt: skip
        annotations.append(label(1, base, f"base model {base:.2f}", xref="paper", xanchor="right", yshift=11))
    sizes = [p["trainable"] for p in points]
    return {
        "data": data,
        "layout": {
            "template": TEMPLATE,
            "uirevision": "pareto",
            "xaxis": {"title": {"text": "trainable parameters (logarithmic)"}, "type": "log",
                      "range": [exponent(min(sizes)) - 0.3, exponent(max(sizes)) + 0.3], "dtick": 1},
            "yaxis": {"title": {"text": "held-out loss (nats)"},
                      "range": [min(values) - 1.6 * pad, max(values) + pad]},
            "shapes": shapes,
            "annotations": annotations,
        },
    }  # fmt: skip


def exponent(n: float) -> float:
    """log₁₀ of a size, as Plotly's logarithmic axes count."""

    return math.log10(max(1.0, n))
