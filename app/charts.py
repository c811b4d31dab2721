"""More figures for notebooks, widgets and docs, as plain dictionaries like those of figures.py: curves, bars, grids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from app.figures import EDGE, INK, MUTED, TEMPLATE, WARM_FILL, Figure, plain

# Told apart by lightness too; the first is what the figure is about, grey what is only for comparison.
COLOURS = (WARM_FILL, "#475569", "#6d28d9", "#0f766e", "#1d4ed8", "#a16207", "#be185d")
GREY = EDGE

Line = tuple[Sequence[float], Sequence[float]] | tuple[Sequence[float], Sequence[float], Sequence[float]]


def curves(lines: Mapping[str, Line], x: str, y: str, *, logx: bool = False, logy: bool = False,
           grey: Sequence[str] = (), level: tuple[str, float] | None = None, dots: bool = True) -> Figure:  # fmt: skip
    """Named curves (x, y) or (x, y, half the width of an interval); `grey` are only for comparison.

    x, y   what the axes are, with units; level: (words, value) of a dashed line across
    """
    colours = iter(COLOURS * (1 + len(lines) // len(COLOURS)))
    data: list[dict[str, Any]] = []
    for name, line in lines.items():
        xs, ys, half = list(line[0]), list(line[1]), list(line[2]) if len(line) > 2 else None
        colour = GREY if name in grey else next(colours)
        data.append(
            {"type": "scatter", "mode": "lines+markers" if dots else "lines", "x": xs, "y": ys, "name": shown(name),
             "line": {"color": colour, "width": 2 if name not in grey else 1.5,
                      "dash": "dot" if name in grey else "solid"},
             "marker": {"color": colour, "size": 8},
             "error_y": {"type": "data", "array": half or [], "visible": half is not None, "color": colour,
                         "thickness": 1.5},
             "hovertemplate": f"{plain(name)}<br>{x} %{{x:.4g}}<br>{y} %{{y:.4g}}<extra></extra>"})  # fmt: skip
    ticks = sorted({v for line in lines.values() for v in line[0]})
    few = {"tickvals": ticks, "ticktext": [f"{v:g}" for v in ticks]} if logx and len(ticks) <= 9 else {}
    shapes, notes = [], []
    if level is not None:
        words, value = level
        shapes.append({"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value,
                       "line": {"color": MUTED, "width": 1.5, "dash": "dash"}})  # fmt: skip
        notes.append({"xref": "paper", "x": 1, "xanchor": "right", "y": value, "yanchor": "bottom", "showarrow": False,
                      "text": shown(words), "font": {"size": 14, "color": MUTED}})  # fmt: skip
    layout = _layout(x, y, legend=len(lines) > 1)
    layout["xaxis"] |= {"type": "log" if logx else "linear", **few}
    layout["yaxis"] |= {"type": "log", "dtick": 1 if _decades(lines) > 1.5 else "D2"} if logy else {}
    return {"data": data, "layout": layout | {"shapes": shapes, "annotations": notes}}


def bars(groups: Mapping[str, Mapping[str, float]], y: str, *, x: str = "", stacked: bool = False,
         logy: bool = False) -> Figure:  # fmt: skip
    """{series: {bar: value}}, side by side or stacked."""
    colours = ("#475569", WARM_FILL, "#94a3b8", "#6d28d9", "#0f766e") if len(groups) > 1 else (WARM_FILL,)
    data = [
        {"type": "bar", "name": shown(name), "x": list(values), "y": list(values.values()),
         "marker": {"color": colours[i % len(colours)]},
         "hovertemplate": f"{plain(name)}, %{{x}}<br>%{{y:.4g}}<extra></extra>"}
        for i, (name, values) in enumerate(groups.items())
    ]  # fmt: skip
    layout = _layout(x, y, legend=len(groups) > 1)
    layout["yaxis"] |= {"type": "log" if logy else "linear"}
    layout["xaxis"] |= {"type": "category"}
    return {"data": data, "layout": layout | {"barmode": "stack" if stacked else "group"}}


def grid(values: Sequence[Sequence[float]], x: str, y: str, title: str, *, low: float | None = 0.0,
         high: float | None = None, xs: Sequence[Any] | None = None,
         ys: Sequence[Any] | None = None) -> Figure:  # fmt: skip
    """A matrix of numbers as colours: rows downwards, as one writes a matrix. title: what the colours are."""
    rows = [list(map(float, r)) for r in values]
    xs = list(xs) if xs is not None else list(range(1, len(rows[0]) + 1))
    ys = list(ys) if ys is not None else list(range(1, len(rows) + 1))
    data = [{"type": "heatmap", "x": xs, "y": ys, "z": rows, "zmin": low, "zmax": high, "colorscale": "Cividis",
             "colorbar": {"title": {"text": title, "side": "right"}, "thickness": 12, "outlinewidth": 0},
             "hovertemplate": f"{x} %{{x}}, {y} %{{y}}<br>{title} %{{z:.3g}}<extra></extra>"}]  # fmt: skip
    layout = _layout(x, y, legend=False)
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    layout["xaxis"] |= {"showgrid": False}
    return {"data": data, "layout": layout}


def matrices(named: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Small matrices side by side in one scale, orange above zero and blue below."""
    n = len(named)
    top = max((abs(float(v)) for m in named.values() for row in m for v in row), default=1.0) or 1.0
    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = {"template": TEMPLATE, "annotations": [], "margin": {"l": 16, "r": 16, "t": 34, "b": 12}}
    for i, (name, m) in enumerate(named.items()):
        axis = "" if i == 0 else str(i + 1)
        data.append({"type": "heatmap", "z": [list(map(float, r)) for r in m], "xaxis": f"x{axis}", "yaxis": f"y{axis}",
                     "zmin": -top, "zmax": top, "showscale": i == n - 1, "xgap": 1, "ygap": 1,
                     "colorscale": [[0, "#1d4ed8"], [0.5, "#f3f5f8"], [1, WARM_FILL]],
                     "colorbar": {"thickness": 10, "outlinewidth": 0},
                     "hovertemplate": f"{plain(name)}<br>row %{{y}}, column %{{x}}: %{{z:.3g}}"})  # fmt: skip
        at = [(i + 0.04) / n, (i + 0.96) / n]
        layout[f"xaxis{axis}"] = {"domain": at, "visible": False}
        layout[f"yaxis{axis}"] = {"visible": False, "autorange": "reversed", "scaleanchor": f"x{axis}",
                                  "anchor": f"x{axis}"}  # fmt: skip
        layout["annotations"].append({"text": shown(name), "xref": "paper", "yref": "paper", "x": sum(at) / 2, "y": 1,
                                      "yanchor": "bottom", "showarrow": False,
                                      "font": {"size": 15, "color": INK}})  # fmt: skip
    return {"data": data, "layout": layout}


def shown(text: str) -> str:
    """A name where Plotly reads HTML but no placeholders: legends and annotations."""
    return plain(text).replace("%%", "%")


def _decades(lines: Mapping[str, Line]) -> float:
    """How many powers of ten the values span."""
    values = [float(v) for line in lines.values() for v in line[1] if v > 0]  # NaN is not above 0
    return math.log10(max(values) / min(values)) if values else 0.0


def _layout(x: str, y: str, *, legend: bool) -> dict[str, Any]:
    return {
        "template": TEMPLATE,
        "showlegend": legend,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 14}},
        "margin": {"l": 60, "r": 20, "t": 40 if legend else 14, "b": 50},
        "xaxis": {"title": {"text": x}},
        "yaxis": {"title": {"text": y}},
    }
