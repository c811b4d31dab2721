"""Results to Plotly figures: pure functions that give plain dictionaries, shared by the page, notebooks and docs.

    import plotly.graph_objects as go
    go.Figure(figures.loss(events))

No plotly is imported here: a figure is {"data": [...], "layout": {...}}, which `go.Figure` and `Plotly.react` take.
Colours are the light theme's; the page swaps them for its tokens (app/static/plot.js). Slate is the base model, the
warm accent what was adapted, edge grey what is only for comparison. ‖ΔW‖ has a ramp of its own, other measures cividis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Figure = dict[str, Any]
Event = Mapping[str, Any]

INK, MUTED, EDGE, LINE, CARD = "#0f172a", "#475569", "#76859a", "#dde3ea", "#ffffff"
BASE, WARM, WARM_FILL, WARM_SOFT, BASE_SOFT = "#475569", "#b4400c", "#e8590c", "#fde6d3", "#e8edf3"
FONT = 'Inter, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif'
RAMP = [[0.0, BASE_SOFT], [1.0, WARM_FILL]]
MOST_POINTS = 1500  # of one curve: a long run is thinned, evenly

_AXIS = {"title": {"font": {"size": 15, "color": MUTED}, "standoff": 8}, "tickfont": {"size": 14, "color": MUTED},
         "gridcolor": LINE, "linecolor": LINE, "zeroline": False, "automargin": True}  # fmt: skip
TEMPLATE: dict[str, Any] = {
    "layout": {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 15, "color": INK},
        "margin": {"l": 56, "r": 16, "t": 12, "b": 46},
        "showlegend": False,
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": CARD, "bordercolor": EDGE, "font": {"family": FONT, "size": 15, "color": INK}},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
}


def loss(events: Sequence[Event], *, ghosts: Sequence[tuple[str, Sequence[Event]]] = (), revision: str = "") -> Figure:
    """The loss of a run as it goes: a point a step, the smoothed line, held-out points, and the base model's line.

    events  as `lora_core.train` yields them, as dictionaries
    ghosts  (name, events) of other runs, drawn thin behind
    """
    steps = max((int(e.get("steps") or 0) for e in events), default=0) or 60
    points = thin([(e["step"], e["loss"]) for e in events if e.get("kind") == "step" and finite(e.get("loss"))])
    held = held_out(events)
    base = held[0][1] if held and held[0][0] == 0 else None
    others = []
    for name, theirs in ghosts:
        curve = thin([(e["step"], e["loss"]) for e in theirs if e.get("kind") == "step" and finite(e.get("loss"))])
        if curve:
            others.append((name, [x for x, _ in curve], smooth([y for _, y in curve]), held_out(theirs)))
            steps = max(steps, curve[-1][0])
    line = smooth([y for _, y in points])
    data: list[dict[str, Any]] = [
        {"x": [x for x, _ in points], "y": [y for _, y in points], "mode": "markers", "type": "scatter",
         "marker": {"size": 5, "color": WARM_FILL, "opacity": 0.4}, "name": "training",
         "hovertemplate": "step %{x}<br>loss %{y:.2f} nats a token<extra></extra>"},
        *({"x": x, "y": y, "mode": "lines", "type": "scatter", "line": {"color": EDGE, "width": 1.5}, "name": name,
           "hovertemplate": f"{plain(name)}, step %{{x}}<br>loss %{{y:.2f}}, smoothed<extra></extra>"}
          for name, x, y, _ in others),
        *({"x": [p for p, _ in h], "y": [q for _, q in h], "mode": "markers", "type": "scatter",
           "name": f"{name}, held out", "marker": {"size": 9, "color": CARD, "line": {"color": EDGE, "width": 1.5}},
           "hovertemplate": f"{plain(name)}, held out, step %{{x}}<br>loss %{{y:.2f}}<extra></extra>"}
          for name, _, _, h in others),
        {"x": [x for x, _ in points], "y": line, "mode": "lines", "type": "scatter", "name": "training, smoothed",
         "line": {"color": WARM_FILL, "width": 2.5}, "hoverinfo": "skip"},
        {"x": [x for x, _ in held], "y": [y for _, y in held], "mode": "markers", "type": "scatter", "name": "held out",
         "marker": {"size": 12, "color": WARM, "line": {"color": CARD, "width": 2}},
         "hovertemplate": "held out, step %{x}<br>loss %{y:.3f} nats a token<extra></extra>"},
    ]  # fmt: skip
    values = [y for _, y in held] + line + [v for _, _, y, h in others for v in [*y, *(q for _, q in h)]]
    annotations: list[dict[str, Any]] = []
    shapes: list[dict[str, Any]] = []
    if base is not None:
        shapes.append({"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": base, "y1": base, "layer": "below",
                       "line": {"color": BASE, "width": 1.5, "dash": "dash"}})  # fmt: skip
        annotations.append(label(1, base, f"base model {base:.2f}", xref="paper", xanchor="right", yshift=11))
    for name, x, y, h in others:
        text = f"{plain(name)} {h[-1][1]:.2f}" if h else plain(name)
        annotations.append(label(x[-1], y[-1], text, xanchor="right", yshift=-14, size=14))
    if held and held[-1][0] > 0:
        x, y = held[-1]
        below = bool(line) and line[-1] > y  # not onto the smoothed line
        annotations.append(label(x, y, f"<b>{y:.2f}</b>", yshift=-20 if below else 21, size=17, color=WARM,
                                 xanchor="right" if x > 0.9 * steps else "center"))  # fmt: skip
    return {
        "data": data,
        "layout": {
            "template": TEMPLATE,
            "uirevision": revision or "loss",
            "xaxis": {"title": {"text": "step"}, "range": [-0.01 * steps, 1.02 * steps]},
            "yaxis": {"title": {"text": "loss (nats a token)"}, "range": span(values, base)},
            "shapes": shapes,
            "annotations": annotations,
        },
    }


def spectrum(sigma: Sequence[float], energy: Sequence[float], random: Sequence[float], random_energy: Sequence[float],
             *, needed: int = 0, base: Sequence[float] = (), other: tuple[str, Sequence[float], Sequence[float]] | None
             = None, log: bool = False) -> Figure:  # fmt: skip
    """The singular values of one ΔW and the energy that its first directions hold, over a same-norm random update.

    sigma, random    singular values, largest first, in the units of the weights
    energy           cumulative share of Σσ², from 0 to 1; needed: how many directions hold 90 % of it
    base             singular values of W0, as many as fit, drawn behind
    other            (name, singular values, energy) of the same matrix in another adapter
    log              σ on a logarithmic axis, where W0 and an update both have room
    """
    n = max(len(sigma), len(other[1]) if other else 0)
    x = list(range(1, len(sigma) + 1))
    many = n > 40  # then points are noise
    dots = "lines" if many else "lines+markers"
    behind = list(base)[:n]

    def line(y: Sequence[float], name: str, color: str, what: str, width: float = 1.5, dash: str = "dot", size: int = 6,
             **more: Any) -> dict[str, Any]:  # fmt: skip
        return {"x": list(range(1, len(y) + 1)), "y": list(y), "mode": dots, "type": "scatter", "name": name,
                "marker": {"size": size, "color": color}, "line": {"color": color, "width": width, "dash": dash},
                "hovertemplate": f"{plain(name)}<br>{what}<extra></extra>", **more}  # fmt: skip

    one, share = "direction %{x}: σ = %{y:.3g}", "first %{x}: %{y:.0f} % of Σσ²"
    big = 10 if n <= 20 else 7
    low: dict[str, Any] = {"yaxis": "y2", "mode": "lines"}
    data = [line(behind, "W0", BASE, one, 2, "solid", 5)] if behind else []
    data.append(line(random, "random, same norm", EDGE, one))
    if other:
        data.append(line(other[1], other[0], INK, one, 2, "dash", big - 2, marker={"size": big - 2, "color": INK,
                                                                                    "symbol": "square"}))  # fmt: skip
    data.append(line(sigma, "ΔW", WARM_FILL, one, 2, "solid", big))
    data.append(line([100 * e for e in random_energy], "random, energy", EDGE, share, **low))
    if other:
        data.append(line([100 * e for e in other[2]], f"{other[0]}, energy", INK, share, 2, "dash", **low))
    data.append(line([100 * e for e in energy], "ΔW, energy", WARM_FILL, share, 2, "solid", yaxis="y2",
                     marker={"size": 8 if n <= 20 else 6, "color": [WARM_FILL if i <= needed else WARM_SOFT for i in x],
                             "line": {"color": WARM_FILL, "width": 1.5}}))  # fmt: skip
    seen = [v for v in (*sigma, *random, *behind, *(other[1] if other else ())) if v > 0]
    top = max(seen, default=1.0)
    least = max(min(seen, default=0.1), 1e-4 * top)  # below four decades there is only rounding

    def at(y: float) -> float:
        return math.log10(max(y, least)) if log else y

    def named(y: Sequence[float], i: int, text: str, **more: Any) -> dict[str, Any]:
        """A name above its line at its i-th value."""
        return label(i + 1, at(y[i]), text, **{"yshift": 13, **more})

    annotations = []
    if x:
        flat = log and many  # the lines of full rank lie far apart in the middle and fall together at the end
        begin, end = (n // 4, int(0.6 * len(random))) if flat else (0, len(random) - 1 if log else 0)
        place: dict[str, Any] = {} if flat else {"xanchor": "left", "xshift": 12, "yshift": 8 if log else 0}
        annotations = [
            {**named(random, end, "random, same norm", xanchor="right", size=14), "x": end + 1 if log else len(random)},
            named(sigma, min(begin, len(sigma) - 1), "<b>ΔW</b>", color=WARM, **place),
            label(n, 90, "90 %", yref="y2", xanchor="right", yshift=-11, size=14),
        ]
    if behind:
        last = int(0.6 * len(behind)) if log and many else len(behind) - 1
        annotations.append(named(behind, last, "<b>W0</b>", xanchor="right", color=BASE))
    if other and len(other[1]):
        annotations.append(named(other[1], len(other[1]) - 1, plain(other[0]), xanchor="right", yshift=-13, size=14,
                                 color=INK))  # fmt: skip
    y = {"range": [math.log10(least) - 0.15, math.log10(top) + 0.2], "type": "log", "dtick": 1} if log else {
        "range": [0, 1.12 * top]}  # fmt: skip
    return {
        "data": data,
        "layout": {
            "template": TEMPLATE,
            "uirevision": "spectrum",
            "hovermode": "closest",
            "margin": {"l": 60, "r": 12, "t": 8, "b": 44},
            "xaxis": {"title": {"text": "direction"}, "range": [0.6, n + 0.4], "anchor": "y2", "dtick": tick(n)},
            "yaxis": {"title": {"text": "σ, log axis" if log else "singular value σ"}, "domain": [0.45, 1], **y},
            "yaxis2": {"title": {"text": "energy (%)" if log else "energy (% of Σσ²)"},
                       "domain": [0, 0.36], "range": [0, 106], "dtick": 50},
            "shapes": [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": "y2", "y0": 90, "y1": 90,
                        "line": {"color": MUTED, "width": 1, "dash": "dash"}}],
            "annotations": annotations,
        },
    }  # fmt: skip


def heatmap(values: Mapping[str, Sequence[float | None]], title: str, *, norm: bool = True) -> Figure:
    """Layer by matrix: {matrix: [value of layer 0, 1, …]}, None where nothing was adapted. `title`: the measure."""
    names = list(values)
    layers = max((len(row) for row in values.values()), default=0)
    return {
        "data": [{"type": "heatmap", "x": list(range(layers)), "y": names, "z": [list(values[n]) for n in names],
                  "xgap": 1, "ygap": 1, "colorscale": RAMP if norm else "Cividis", **({"zmin": 0} if norm else {}),
                  "colorbar": {"title": {"text": title, "side": "right"}, "thickness": 12, "outlinewidth": 0},
                  "hovertemplate": f"layer %{{x}}, %{{y}}<br>{title} %{{z:.3g}}<extra></extra>"}],
        "layout": {"template": TEMPLATE, "xaxis": {"title": {"text": "layer"}, "showgrid": False},
                   "yaxis": {"title": {"text": "matrix"}, "autorange": "reversed", "showgrid": False,
                             "type": "category"}},
    }  # fmt: skip


# ---- pieces
def held_out(events: Sequence[Event]) -> list[tuple[int, float]]:
    """(step, held-out loss), from the base model at step 0 on; each step once."""
    found: dict[int, float] = {}
    for e in events:
        value = e.get("held_loss")
        if e.get("kind") in ("base", "held", "end") and isinstance(value, (int, float)) and finite(value):
            found[0 if e["kind"] == "base" else int(e["step"])] = float(value)
    return sorted(found.items())


def smooth(values: Sequence[float], keep: float = 0.75) -> list[float]:
    """Exponential moving average that starts at the first value."""
    out: list[float] = []
    for v in values:
        out.append(v if not out else keep * out[-1] + (1 - keep) * v)
    return out


def thin(points: Sequence[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """At most about so many points, evenly taken, the last one among them."""
    every = -(-len(points) // most) if points else 1
    return [p for i, p in enumerate(points) if (len(points) - 1 - i) % every == 0]


def span(values: Sequence[float], base: float | None = None) -> list[float]:
    """A range of the loss axis around the values, with room for the labels, and from the start for a loss that falls.

    So the axis stands still while a run begins, and small ripples look small.
    """
    low, high = (min(values), max(values)) if values else (0.0, 4.0)
    low = min(low, 0.55 * base) if base is not None else low
    pad = max(0.09 * (high - low), 0.05)
    return [max(0.0, low - 1.6 * pad), high + 1.4 * pad]


def tick(n: int) -> int:
    """The distance of the ticks on an axis from 1 to n."""
    return next(d for d in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1 << 30) if n / d <= 16)


def label(x: float, y: float, text: str, *, size: int = 15, color: str = MUTED, **more: Any) -> dict[str, Any]:
    """A word beside a line, instead of a legend."""
    return {"x": x, "y": y, "text": text, "showarrow": False, "font": {"size": size, "color": color}, **more}


def plain(text: str) -> str:
    """A name as it stands: Plotly reads some HTML, and % as a placeholder."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("%", "%%")


def finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
