"""Figures of a room's wall, to be read from the back row: everybody's curves, losses against size, spectra.

As in figures.py a figure is a plain dictionary in the light theme's colours. All words have 20 px at least.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from app.figures import BASE, CARD, EDGE, INK, MUTED, TEMPLATE, WARM, WARM_FILL, WARM_SOFT, Figure, finite, label, plain
from app.figures_train import exponent

SIZE = 20  # px of the smallest word on the wall
DIRECTIONS = 16
DASHES = ("solid", "dash", "dot", "dashdot")


def large(figure: Figure) -> Figure:
    """The same with words that a back row reads."""
    layout = dict(figure["layout"])
    for axis in [a for a in layout if a.startswith(("xaxis", "yaxis"))]:
        given = dict(layout[axis])
        title = {"font": {"size": SIZE, "color": MUTED}, "standoff": 10, **given.get("title", {})}
        layout[axis] = {**given, "title": title, "tickfont": {"size": SIZE, "color": MUTED}}
    layout["font"] = {**TEMPLATE["layout"]["font"], "size": SIZE}
    layout["hoverlabel"] = {"font": {"size": SIZE}}
    layout["annotations"] = [{**a, "font": {**a.get("font", {}), "size": max(SIZE, a.get("font", {}).get("size", 0))}}
                             for a in layout.get("annotations", ())]  # fmt: skip
    return {"data": figure["data"], "layout": {"template": TEMPLATE, "margin": {"l": 84, "r": 20, "t": 12, "b": 66},
                                               **layout}}  # fmt: skip


def spread(curves: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """{"low", "median", "high"} at every point: the median, and the tenth and ninetieth of a hundred."""
    n = max((len(c) for c in curves), default=0)
    columns = [sorted(c[min(i, len(c) - 1)] for c in curves) for i in range(n)]

    def at(values: Sequence[float], share: float) -> float:
        where = share * (len(values) - 1)
        low = math.floor(where)
        high = min(low + 1, len(values) - 1)
        return values[low] + (where - low) * (values[high] - values[low])

    return {"low": [at(c, 0.1) for c in columns], "median": [statistics.median(c) for c in columns],
            "high": [at(c, 0.9) for c in columns]}  # fmt: skip


def curves(losses: Sequence[Sequence[float]], steps: int, names: Sequence[str], *, what: str = "loss",
           log: bool = False) -> Figure:  # fmt: skip
    """Everybody's curve thin, their spread as a band, the median on top.

    losses  of each device, at evenly spaced steps from 0 to `steps`; names: whose they are
    what    the name of the axis; log: on a logarithmic one
    """
    band = spread(losses)
    every = [v for c in losses for v in c if v > 0]
    least = 1e-6

    def line(values: Sequence[float], name: str, color: str, width: float, **more: Any) -> dict[str, Any]:
        n = max(1, len(values) - 1)
        y = [max(v, least) if log else v for v in values]
        x = [round(steps * i / n, 2) for i in range(len(values))]
        return {"x": x, "y": y, "mode": "lines", "type": "scatter", "name": name,
                "line": {"color": color, "width": width},
                "hovertemplate": f"{plain(name)}<br>step %{{x:.0f}}: loss %{{y:.3g}}<extra></extra>",
                **more}  # fmt: skip

    data = [line(band["low"], "10 %", WARM_SOFT, 0), line(band["high"], "90 %", WARM_SOFT, 0, fill="tonexty",
                                                          fillcolor=WARM_SOFT)]  # fmt: skip
    data += [line(c, n, EDGE, 1.25, opacity=0.55) for c, n in zip(losses, names, strict=True)]
    data.append(line(band["median"], "median", WARM_FILL, 5))
    top = 1.1 * min(max(band["high"], default=1.0), 2.5)
    y: dict[str, Any] = {"title": {"text": what + (", logarithmic" if log else "")}}
    if log:
        low, high = math.log10(max(min(every, default=1.0), least)), math.log10(max(every, default=1.0))
        y |= {"type": "log", "dtick": 1, "exponentformat": "power", "range": [low - 0.2, high + 0.3]}
    else:
        y |= {"range": [0, top or 1.0]}
    notes = []
    if band["median"]:
        notes.append(label(1, 1, f"<b>median {number(band['median'][-1])} at the end</b>", xref="paper", yref="paper",
                           xanchor="right", yanchor="top", color=WARM, size=SIZE))  # fmt: skip
    x: dict[str, Any] = {"title": {"text": "step"}, "range": [0, steps * 1.01], "nticks": 7}
    return large({"data": data, "layout": {"xaxis": x, "yaxis": y,
                                           "annotations": notes, "uirevision": "curves"}})  # fmt: skip


def say_curves(losses: Sequence[Sequence[float]], steps: int, what: str = "loss") -> str:
    """What the picture shows, in one sentence."""
    ends = sorted(c[-1] for c in losses)
    if len(ends) == 1:
        return f"One device so far: after {steps:,} steps its {what} is {number(ends[0])}."
    half = statistics.median(ends)
    return (f"On {len(ends)} devices, each with its own random numbers, the {what} ends between {number(ends[0])} and "
            f"{number(ends[-1])}; the median is {number(half)}.")  # fmt: skip


def number(x: float) -> str:
    """Two digits that say something: 0.032, 1.5·10⁻⁵."""
    if x == 0 or 1e-3 <= abs(x) < 1e4:
        return f"{x:.2g}" if abs(x) < 100 else f"{x:.0f}"
    digits, power = f"{x:.1e}".split("e")
    return f"{digits}·10{str(int(power)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def pareto(points: Sequence[Mapping[str, Any]], front: Sequence[int], base: float | None) -> Figure:
    """Held-out loss against trainable parameters: the front of those that no other beats, and the rest.

    points  {"run", "says", "who", "trainable", "loss"} of every run that is over; front: their runs, by rising size
    """
    by_run = {p["run"]: p for p in points}
    line = [by_run[r] for r in front]

    def dots(some: Sequence[Mapping[str, Any]], name: str, marker: dict[str, Any]) -> dict[str, Any]:
        return {"x": [p["trainable"] for p in some], "y": [p["loss"] for p in some], "mode": "markers",
                "type": "scatter", "name": name, "marker": marker, "customdata": [p["run"] for p in some],
                "text": [plain(f"{p['says']}, {p['who']}") for p in some],
                "hovertemplate": "%{text}<br>%{x:,} parameters, loss %{y:.3f} nats<extra></extra>"}  # fmt: skip

    data = [{"x": [p["trainable"] for p in line], "y": [p["loss"] for p in line], "mode": "lines", "type": "scatter",
             "line": {"color": WARM_FILL, "width": 3, "shape": "hv"}, "hoverinfo": "skip", "name": "front"},
            dots([p for p in points if p["run"] not in front], "beaten by another",
                 {"size": 15, "color": CARD, "line": {"color": EDGE, "width": 3}}),
            dots(line, "on the front", {"size": 19, "color": WARM_FILL})]  # fmt: skip
    values = [p["loss"] for p in points] + ([base] if base is not None else [])
    sizes = [p["trainable"] for p in points]
    low, high = exponent(min(sizes, default=1)), exponent(max(sizes, default=10))
    room = 0.16 * max(0.4, high - low)
    notes = []
    for p in line:
        right = exponent(p["trainable"]) > low + 0.25 * (high - low)  # below a step of the front there is room
        notes.append(label(exponent(p["trainable"]), p["loss"], f"<b>{plain(p['says'])}</b>", yshift=-24, color=WARM,
                           xanchor="right" if right else "left"))  # fmt: skip
    shapes = []
    if base is not None:
        shapes.append({"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": base, "y1": base, "layer": "below",
                       "line": {"color": BASE, "width": 2, "dash": "dash"}})  # fmt: skip
        notes.append(label(1, base, f"base model {base:.2f}", xref="paper", xanchor="right", yshift=16))
    pad = 0.14 * (max(values, default=1.0) - min(values, default=0.0)) or 0.2
    return large({"data": data, "layout": {
        "xaxis": {"title": {"text": "trainable parameters"}, "type": "log", "range": [low - room, high + room],
                  "dtick": 1},
        "yaxis": {"title": {"text": "held-out loss (nats)"}, "nticks": 6,
                  "range": [min(values, default=0.0) - 1.8 * pad, max(values, default=1.0) + 1.2 * pad]},
        "shapes": shapes, "annotations": notes, "uirevision": "pareto"}})  # fmt: skip


def losses(runs: Sequence[Mapping[str, Any]], base: float | None) -> Figure:
    """The training loss of every run, smoothed, with its name at its end.

    runs  {"says", "who", "set", "curve": [(step, loss)]}; a set of matrices has a dash of its own
    """
    sets = list(dict.fromkeys(r["set"] for r in runs))
    data, ends = [], []
    for r in runs:
        x, y = [p[0] for p in r["curve"]], [p[1] for p in r["curve"]]
        if not x:
            continue
        dash = DASHES[sets.index(r["set"]) % len(DASHES)]
        data.append({"x": x, "y": y, "mode": "lines", "type": "scatter", "name": r["says"],
                     "line": {"color": WARM_FILL, "width": 3, "dash": dash}, "opacity": 0.85,
                     "hovertemplate": f"{plain(r['says'])}, {plain(r['who'])}<br>step %{{x}}: loss %{{y:.2f}}"
                                      "<extra></extra>"})  # fmt: skip
        ends.append((x[-1], y[-1], str(r["says"])))
    values = [v for d in data for v in d["y"]] + ([base] if base is not None else [])
    steps = max((d["x"][-1] for d in data), default=1)
    low, high = min(values, default=0.0), max(values, default=1.0)
    gap = 0.085 * ((high - low) or 1.0)
    notes = beside(ends, gap)
    last = max((a["y"] for a in notes), default=high)
    shapes = []
    if base is not None:
        shapes.append({"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": base, "y1": base, "layer": "below",
                       "line": {"color": BASE, "width": 2, "dash": "dash"}})  # fmt: skip
        notes.append(label(0, base, f"base model {base:.2f}", xanchor="left", yshift=-16))
    return large({"data": data, "layout": {
        "xaxis": {"title": {"text": "step"}, "range": [0, 1.3 * steps], "nticks": 6},
        "shapes": shapes, "annotations": notes,
        "yaxis": {"title": {"text": "training loss (nats)"}, "range": [low - 0.06 * (high - low) - 0.02,
                                                                       max(high, last) + 0.08 * (high - low) + 0.02]},
        "uirevision": "losses"}})  # fmt: skip


def beside(ends: Sequence[tuple[float, float, str]], gap: float, most: int = 12) -> list[dict[str, Any]]:
    """Names at the ends of lines, (x, y, name), each once and none over another at the same x."""
    seen: dict[str, tuple[float, float, str]] = {}
    for end in sorted(ends, key=lambda e: e[1]):
        seen.setdefault(end[2], end)
    notes: list[dict[str, Any]] = []
    top: dict[float, float] = {}
    for x, y, name in list(seen.values())[:most]:
        top[x] = max(y, top.get(x, -math.inf) + gap)
        notes.append(label(x, top[x], plain(name), xanchor="left", xshift=10, color=INK))
    return notes


def holding(sigma: Sequence[float], share: float = 0.9) -> int:
    """How many of the first directions hold so much of Σσ²."""
    total, got = sum(s * s for s in sigma), 0.0
    for i, s in enumerate(sigma):
        got += s * s
        if got >= share * total * (1 - 1e-9):
            return i + 1
    return len(sigma)


def spectra(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """The singular values of each run's largest ΔW over their own largest.

    runs  {"says", "who", "set", "sigma": largest first}
    """
    sets = list(dict.fromkeys(r["set"] for r in runs))
    data, ends = [], []
    for r in sorted(runs, key=lambda r: len(r["sigma"])):
        y = [s / r["sigma"][0] for s in r["sigma"][:DIRECTIONS]]
        data.append({"x": list(range(1, len(y) + 1)), "y": y, "mode": "lines+markers", "type": "scatter",
                     "name": r["says"], "marker": {"size": 10, "color": WARM_FILL},
                     "line": {"color": WARM_FILL, "width": 3, "dash": DASHES[sets.index(r["set"]) % len(DASHES)]},
                     "opacity": 0.85,
                     "hovertemplate": f"{plain(r['says'])}, {plain(r['who'])}<br>direction %{{x}}: %{{y:.2f}} of σ₁"
                                      "<extra></extra>"})  # fmt: skip
        ends.append((len(y), y[-1], str(r["says"])))
    n = max((len(d["x"]) for d in data), default=1)
    notes = beside(ends, 0.09)
    return large({"data": data, "layout": {
        "xaxis": {"title": {"text": "direction"}, "range": [0.5, 1.35 * n + 0.5]}, "annotations": notes,
        "yaxis": {"title": {"text": "σ over σ₁"}, "range": [0, 1.08]}, "uirevision": "spectra"}})  # fmt: skip


def say_spectra(runs: Sequence[Mapping[str, Any]]) -> str:
    """How many of the directions that were offered carry 90 % of the largest update, in one sentence."""
    parts = {}
    for r in sorted(runs, key=lambda r: len(r["sigma"])):
        parts[r["says"]] = f"{holding(r['sigma'])} of {r['rank']} for {r['says']}"
    words = list(parts.values())[:4]
    if not words:
        return "No run has a spectrum yet."
    return f"Directions that hold 90 % of the largest ΔW: {', '.join(words)}."


def smoothed(events: Sequence[Mapping[str, Any]], most: int = 120) -> list[tuple[int, float]]:
    """(step, smoothed training loss) of a run's events, at most about so many points."""
    from app.figures import smooth, thin

    points = [(int(e["step"]), float(e["loss"])) for e in events if e.get("kind") == "step" and finite(e.get("loss"))]
    line = smooth([y for _, y in points])
    return [(x, round(y, 4)) for x, y in thin([(p[0], y) for p, y in zip(points, line, strict=True)], most)]
