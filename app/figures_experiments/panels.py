"""What figures of experiments are made of: points with their spread, and panels that stand side by side.

A panel is one pair of axes; `build` puts several into one Plotly figure, beside each other or in rows. Where there is
little room the page puts them one below the other (app/static/restack.js), which is why each panel has axes of its own.
Colours are those of `app.figures`; series differ in symbol and dash too, for grey prints and all eyes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.figures import BASE, CARD, EDGE, INK, MUTED, TEMPLATE, WARM, WARM_FILL, Figure
from lora_core.experiments.experiment import Row
from lora_core.experiments.verdicts import by, interval, per_seed

Trace = dict[str, Any]
Paper = Mapping[str, Any]  # the paper's own numbers, as an Experiment has them
Point = tuple[Any, Sequence[float]]  # where, and what was measured there: once for each seed


@dataclass(frozen=True)
class Style:
    """How a series looks: colour, symbol of the points, dash of the line."""

    color: str
    symbol: str = "circle"
    dash: str = "solid"


OURS, SECOND, THIRD = Style(WARM_FILL), Style(BASE, "square", "dash"), Style(INK, "diamond", "dashdot")
FOURTH, CONTROL = Style(WARM, "triangle-up", "longdash"), Style(EDGE, "cross", "dot")
PAPER, PAPER2 = Style(EDGE, "diamond-open", "dot"), Style(EDGE, "square-open", "dot")
STYLES = (OURS, SECOND, THIRD, FOURTH, Style(EDGE, "star", "longdashdot"))


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes. x and y: Plotly's axes without their places; title: what is on it, in a few words."""

    data: Sequence[Trace]
    x: Mapping[str, Any]
    y: Mapping[str, Any]
    title: str = ""
    labels: Sequence[Mapping[str, Any]] = field(default=())  # annotations in the panel's own axes
    lines: Sequence[Mapping[str, Any]] = field(default=())  # shapes in the panel's own axes


def build(title: str, say: str, panels: Sequence[Panel], table: Sequence[Sequence[str]] = (), *, columns: int = 0,
          gap: float = 0.13, aside: bool = False) -> Figure:  # fmt: skip
    """The figure. layout.meta has what is not drawn: "say", what to see; "table", the numbers as words, the first line
    its head; "panels" and "rows" for whoever lays the panels out anew.

    gap: between columns, as a share of the width; aside: points of several series at one word stand beside each other
    """
    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    wide, high, between = (1 - gap * (columns - 1)) / columns, 0, 0.28 if rows > 1 else 0
    high = (1 - between * (rows - 1)) / rows
    layout: dict[str, Any] = {"template": TEMPLATE, "title": {"text": title}, "annotations": [], "shapes": [],
                              "barmode": "stack"}  # fmt: skip
    if aside:
        layout |= {"scattermode": "group", "scattergap": 0.45}
    data: list[Trace] = []
    for i, p in enumerate(panels):
        n, (row, column) = "" if i == 0 else str(i + 1), divmod(i, columns)
        left, top = column * (wide + gap), 1 - row * (high + between)
        x, y = [left, left + wide], [max(0.0, top - high), top]
        layout[f"xaxis{n}"] = {**p.x, "domain": x, "anchor": f"y{n}"}
        layout[f"yaxis{n}"] = {**p.y, "domain": y, "anchor": f"x{n}"}
        data += [{**t, "xaxis": f"x{n}", "yaxis": f"y{n}"} for t in p.data]
        own = [{**a, "xref": f"x{n}{a.get('xref', '')}", "yref": f"y{n}{a.get('yref', '')}"} for a in p.labels]
        if p.title:
            own.append({"text": p.title, "showarrow": False, "xref": f"x{n} domain", "yref": f"y{n} domain", "x": 0,
                        "y": 1, "xanchor": "left", "yanchor": "bottom", "yshift": 4, "align": "left",
                        "font": {"size": 15, "color": INK}})  # fmt: skip
        layout["annotations"] += own
        layout["shapes"] += [{"layer": "below", **s, "xref": f"x{n}{s.get('xref', '')}",
                              "yref": f"y{n}{s.get('yref', '')}"} for s in p.lines]  # fmt: skip
    named = dict.fromkeys(t["name"] for t in data if t.get("showlegend", True) and t.get("name"))
    seen: set[str] = set()
    for t in data:  # one entry for a series that is in several panels
        name = t.get("name")
        t["legendgroup"] = name or ""
        if name in seen:
            t["showlegend"] = False
        elif t.get("showlegend", True):
            seen.add(str(name))
    layout["showlegend"] = len(named) > 1
    layout["legend"] = {"orientation": "h", "x": 0, "xref": "container", "xanchor": "left", "y": 1, "yref": "container",
                        "yanchor": "top",
                        "font": {"size": 14, "color": MUTED}, "itemclick": False, "itemdoubleclick": False,
                        "bgcolor": "rgba(0,0,0,0)"}  # fmt: skip
    layout["margin"] = {"l": 60, "r": 14, "t": (34 if len(named) > 1 else 8) + (26 if any(p.title for p in panels)
                        else 0), "b": 48}  # fmt: skip
    layout["meta"] = {"say": say, "table": [list(r) for r in table], "panels": len(panels), "rows": rows}
    return {"data": data, "layout": layout}


# ---- series with their spread
def curve(points: Iterable[Point], name: str, style: Style = OURS, *, what: str = "", unit: str = "", line: bool = True,
          log: bool = False, legend: bool = True, dodge: float = 1.0) -> list[Trace]:  # fmt: skip
    """Means over seeds with their 95 % intervals, joined, and every seed as a small dot.

    log: the y axis is one; dodge: a factor that moves it aside on a logarithmic x axis, so that intervals stay apart
    """
    found = [(x, list(v)) for x, v in points if len(list(v))]
    at = [x if dodge == 1 else x * dodge for x, _ in found]
    spread = [interval(v) for _, v in found]
    means = [m for m, _ in spread]
    up = [h if math.isfinite(h) else 0.0 for _, h in spread]
    down = [min(h, 0.98 * m) if log else h for h, m in zip(up, means, strict=True)]
    said = [f"{number(m)}{f' ± {number(h)}' if h else ''}{unit}" for m, h in zip(means, up, strict=True)]
    main: Trace = {
        "type": "scatter", "name": name, "x": at, "y": means, "text": said, "customdata": [x for x, _ in found],
        "mode": "lines+markers" if line else "markers", "showlegend": legend,
        "line": {"color": style.color, "width": 2.2, "dash": style.dash},
        "marker": {"size": 9, "color": style.color, "symbol": style.symbol},
        "error_y": {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": style.color,
                    "thickness": 1.4, "width": 4, "visible": any(up)},
        "hovertemplate": f"{name}<br>%{{customdata}}: {what and what + ' '}%{{text}}<extra></extra>"}  # fmt: skip
    return [main, *_seeds([(x, y) for x, (_, v) in zip(at, found, strict=True) for y in v if len(v) > 1], style, name)]


def dots(points: Iterable[Point], name: str, style: Style = OURS, *, what: str = "", unit: str = "",
         ends: Sequence[tuple[float, float]] | None = None) -> list[Trace]:  # fmt: skip
    """The same lying: categories from top to bottom, values to the right. ends: intervals that are known."""
    found = [(y, list(v)) for y, v in points if len(list(v))]
    spread = [interval(v) for _, v in found]
    means = [m for m, _ in spread]
    if ends is None:
        up = down = [h if math.isfinite(h) else 0.0 for _, h in spread]
        said = [f"{number(m)}{f' ± {number(h)}' if h else ''}{unit}" for m, h in zip(means, up, strict=True)]
    else:
        down, up = ([abs(e[i] - m) for e, m in zip(ends, means, strict=True)] for i in (0, 1))
        said = [f"{number(m)} ({number(a)} to {number(b)}){unit}" if a < b else f"{number(m)}{unit}"
                for m, (a, b) in zip(means, ends, strict=True)]  # fmt: skip
    main: Trace = {
        "type": "scatter", "name": name, "y": [y for y, _ in found], "x": means, "text": said, "mode": "markers",
        "orientation": "h", "offsetgroup": name,
        "marker": {"size": 10, "color": style.color, "symbol": style.symbol, "line": {"width": 1.6}
                   if style.symbol.endswith("open") else {}},
        "error_x": {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": style.color,
                    "thickness": 1.4, "width": 4, "visible": any(up) or any(down)},
        "hovertemplate": f"%{{y}}, {name}<br>{what + ' ' if what else ''}%{{text}}<extra></extra>"}  # fmt: skip
    return [main, *_seeds([(x, y) for y, v in found for x in v if len(v) > 1], style, name, "h")]


def no_ends(points: Iterable[Point]) -> list[tuple[float, float]]:
    """Instead of intervals, for values that are no repeats of one another, such as those of the layers."""
    return [(interval(v)[0], interval(v)[0]) for _, v in points]


def _seeds(at: Sequence[tuple[Any, Any]], style: Style, name: str, way: str = "v") -> list[Trace]:
    if not at:
        return []
    return [{"type": "scatter", "name": "each seed", "orientation": way, "offsetgroup": name, "mode": "markers",
             "x": [x for x, _ in at], "y": [y for _, y in at], "showlegend": False, "hoverinfo": "skip", "opacity": 0.6,
             "marker": {"size": 4.5, "color": CARD, "line": {"color": style.color, "width": 1.2}}}]  # fmt: skip


def bars(x: Sequence[str], y: Sequence[float], name: str, color: str, *, text: Sequence[str] = ()) -> Trace:
    """Columns; several of them in a panel are stacked. text: what is said of each on hover."""
    return {"type": "bar", "name": name, "x": list(x), "y": list(y), "text": list(text or map(number, y)),
            "textposition": "none", "marker": {"color": color, "line": {"color": CARD, "width": 1}},
            "hovertemplate": f"%{{x}}, {name}<br>%{{text}}<extra></extra>"}  # fmt: skip


def heat(x: Sequence[Any], y: Sequence[Any], z: Sequence[Sequence[float]], what: str, *, scale: bool) -> Trace:
    """Cells from 0 to 1 in cividis. scale: whether the bar that explains the colours stands beside them."""
    return {"type": "heatmap", "x": [str(v) for v in x], "y": [str(v) for v in y], "z": [list(r) for r in z],
            "zmin": 0, "zmax": 1, "colorscale": "Cividis", "xgap": 1, "ygap": 1, "showscale": scale,
            "showlegend": False, "hovertemplate": f"i = %{{y}}, j = %{{x}}<br>{what} = %{{z:.2f}}<extra></extra>",
            "colorbar": {"thickness": 12, "outlinewidth": 0, "len": 0.42, "y": 1, "yanchor": "top",
                         "title": {"text": what, "side": "right"}}}  # fmt: skip


# ---- axes, lines, words
def axis(title: str, groups: Iterable[Sequence[float]] = (), *, within: tuple[float, float] = (-math.inf, math.inf),
         **more: Any) -> dict[str, Any]:  # fmt: skip
    """A linear axis around the groups: wide enough for the values, and for intervals up to half as wide again.

    within: what the quantity can be, such as 0 to 100 %
    """
    found = _range(groups, lambda v: v)
    if found:
        found = {"range": [max(found["range"][0], within[0]), min(found["range"][1], within[1])]}
    return {"title": {"text": title}, **found, **more}


def log_axis(title: str, groups: Iterable[Sequence[float]] = (), ticks: Sequence[float] = (),
             **more: Any) -> dict[str, Any]:  # fmt: skip
    """A logarithmic axis (the title says so). ticks: the values that are written at it; none: powers of ten."""
    at = {"tickvals": list(ticks), "ticktext": [number(t) for t in ticks], "tickangle": 0} if ticks else {"dtick": 1}
    found = _range([[v for v in g if v > 0] for g in groups], math.log10)
    return {"title": {"text": f"{title} (log)"}, "type": "log", "minor": {"showgrid": False}, **at, **found, **more}


def _range(groups: Iterable[Sequence[float]], f: Any) -> dict[str, Any]:
    groups = [list(g) for g in groups if len(g)]
    values = [f(v) for g in groups for v in g]
    if not values:
        return {}
    low, high = min(values), max(values)
    room = (high - low) or abs(high) * 0.2 or 1.0
    ends = [(m - h, m + h) for m, h in map(interval, groups) if math.isfinite(h)]
    least = min([low, *(f(a) for a, _ in ends if a > 0 or f is not math.log10)])
    most = max([high, *(f(b) for _, b in ends)])
    return {"range": [max(least, low - room / 2) - 0.07 * room, min(most, high + room / 2) + 0.09 * room]}


def categories(names: Sequence[str], title: str = "") -> dict[str, Any]:
    """A vertical axis of words, the first one on top."""
    return {"type": "category", "categoryorder": "array", "categoryarray": list(names)[::-1], "title": {"text": title},
            "range": [-0.6, len(names) - 0.4], "ticks": ""}  # fmt: skip


def level(y: float, color: str = MUTED) -> dict[str, Any]:
    """A dashed line across a panel."""
    return {"type": "line", "xref": " domain", "x0": 0, "x1": 1, "y0": y, "y1": y,
            "line": {"color": color, "width": 1.3, "dash": "dash"}}  # fmt: skip


def mark(x: float, color: str = MUTED) -> dict[str, Any]:
    """A dashed line from the bottom to the top of a panel."""
    return {"type": "line", "yref": " domain", "y0": 0, "y1": 1, "x0": x, "x1": x,
            "line": {"color": color, "width": 1.3, "dash": "dash"}}  # fmt: skip


def note(y: float, text: str, *, x: float = 1, color: str = MUTED, shift: int = 9) -> dict[str, Any]:
    """A word at a level, at the right end of a panel (x = 1) or the left one (x = 0)."""
    return {"xref": " domain", "x": x, "y": y, "text": text, "showarrow": False, "yshift": shift,
            "xanchor": "right" if x else "left", "font": {"size": 14, "color": color}}  # fmt: skip


def number(v: float) -> str:
    """At most three digits, without zeros that say nothing: 0.0123, 4.5, 1,300."""
    if not math.isfinite(v):
        return "–"
    if v == 0:
        return "0"
    if abs(v) >= 1000:
        return f"{float(f'{v:.3g}'):,.0f}"
    return f"{v:.3g}" if abs(v) >= 1e-3 else f"{v:.1e}"


def plus_minus(values: Iterable[float], unit: str = "") -> str:
    """A mean with its 95 % interval, where there is one: "0.213 ± 0.004"."""
    mean, half = interval(values)
    return f"{number(mean)}{f' ± {number(half)}' if math.isfinite(half) and half else ''}{unit}"


# ---- out of rows
def unique(rows: Sequence[Row], column: str) -> list[Any]:
    """The values of a column, each once, as they come."""
    return list(dict.fromkeys(r[column] for r in rows if column in r))


def seeds_at(rows: Sequence[Row], column: str, over: str, **wanted: Any) -> list[tuple[Any, list[float]]]:
    """(value of `over`, what each seed measured there) of the rows that have those values, in order."""
    chosen = by(rows, **wanted)
    return [(x, list(per_seed(chosen, column, **{over: x}).values())) for x in sorted(unique(chosen, over))]


def values(points: Sequence[tuple[Any, Sequence[float]]]) -> list[list[float]]:
    return [list(v) for _, v in points]


def scores(paper: Paper, length: int) -> dict[str, tuple[list[float], float]]:
    """{"WikiSQL": (values, ±)} of the paper's columns of that many numbers: those named with a ± and a spread."""
    found = {}
    for key, column in paper.items():
        name, sign, spread = key.partition(" ±")
        if sign and isinstance(column, Sequence) and len(column) == length:
            found[name] = ([float(v) for v in column], float(spread))
    return found
