"""Figures of Compare: held-out loss along the dials; two adapters beside each other. Plain dicts, as in figures.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.figures import BASE, EDGE, MUTED, TEMPLATE, WARM, WARM_FILL, Figure, label

STYLE: dict[str, dict[str, Any]] = {
    "k": {"name": "k of each matrix", "line": {"color": WARM_FILL, "width": 2.5}},
    "mb": {"name": "best for its size", "line": {"color": EDGE, "width": 1.5, "dash": "dot"}},
    "energy": {"name": "same share of each", "line": {"color": EDGE, "width": 1.5, "dash": "dash"}},
}


def along_the_cut(
    ticks: Mapping[str, Sequence[Mapping[str, Any]]],
    loss: Mapping[str, Sequence[float]],
    base: float | None,
    energy: Sequence[float],
) -> Figure:
    """Held-out loss over the mean number of directions that a matrix keeps, for each dial, and Σσ² that they hold.

    ticks   {dial: [{"mean", "kept", "bytes", …}]}; loss: {dial: nats a token at each tick} of what is measured
    energy  share of Σσ² in the first k = 0, 1, … directions of every matrix
    """
    data: list[dict[str, Any]] = [
        {
            "x": list(range(len(energy))),
            "y": list(energy),
            "yaxis": "y2",
            "type": "scatter",
            "mode": "lines",
            "fill": "tozeroy",
            "fillcolor": "rgba(118,133,154,0.13)",
            "line": {"color": EDGE, "width": 1},
            "hovertemplate": "%{x} directions hold %{y:.0%} of Σσ²<extra></extra>",
            "name": "energy",
        }
    ]
    values: list[float] = []
    for name in ("energy", "mb", "k"):
        if name not in loss:
            continue
        t, y = ticks[name], list(loss[name])
        values += y
        data.append(
            {
                "x": [p["mean"] for p in t],
                "y": y,
                "type": "scatter",
                "mode": "lines+markers",
                **STYLE[name],
                "marker": {"size": 6 if name == "k" else 4, "color": STYLE[name]["line"]["color"]},
                "customdata": [[100 * p["kept"], p["bytes"] / 1e6] for p in t],
                "hovertemplate": STYLE[name]["name"] + "<br>%{x:.2g} directions a matrix, %{customdata[0]:.0f} % of "
                "the energy, %{customdata[1]:.2f} MB<br>loss %{y:.3f}<extra></extra>",
            }
        )
    shapes, notes = _base_line(base)
    return {
        "data": data,
        "layout": {
            "template": TEMPLATE,
            "uirevision": "cut",
            "margin": {"l": 56, "r": 58, "t": 14, "b": 44},
            "xaxis": {
                "title": {"text": "directions kept in a matrix, mean"},
                "range": [-0.02 * len(energy), len(energy) - 0.9],
            },
            "yaxis": {"title": {"text": "loss (nats)"}, "range": _range([*values, base])},
            "yaxis2": {
                "title": {"text": "energy", "font": {"size": 15, "color": MUTED}},
                "overlaying": "y",
                "side": "right",
                "range": [0, 1.06],
                "tickvals": [0, 0.5, 1],
                "tickformat": ".0%",
                "showgrid": False,
                "tickfont": {"size": 14, "color": MUTED},
            },
            "shapes": shapes,
            "annotations": notes,
        },
    }


def along_the_strength(strengths: Sequence[float], loss: Sequence[float], base: float | None) -> Figure:
    """Held-out loss of W0 + t·ΔW over t."""
    shapes, notes = _base_line(base)
    return {
        "data": [
            {
                "x": list(strengths),
                "y": list(loss),
                "type": "scatter",
                "mode": "lines+markers",
                "name": "loss",
                "line": {"color": WARM_FILL, "width": 2.5},
                "marker": {"size": 6, "color": WARM_FILL},
                "hovertemplate": "ΔW × %{x}<br>loss %{y:.3f}<extra></extra>",
            }
        ],
        "layout": {
            "template": TEMPLATE,
            "uirevision": "strength",
            "margin": {"l": 56, "r": 16, "t": 14, "b": 44},
            "xaxis": {"title": {"text": "strength of ΔW (1 as it was learnt, 0 the base)"}},
            "yaxis": {"title": {"text": "loss (nats)"}, "range": _range([*loss, base])},
            "shapes": shapes,
            "annotations": notes,
        },
    }


def spectra_of_two(sigma: Sequence[Sequence[float]], names: Sequence[str], where: str) -> Figure:
    """Singular values of one matrix in two adapters, over each other."""
    data: list[dict[str, Any]] = []
    for s, name, colour, shape in zip(sigma, names, (WARM_FILL, BASE), ("circle", "diamond"), strict=False):
        data.append(
            {
                "x": list(range(1, len(s) + 1)),
                "y": list(s),
                "type": "scatter",
                "mode": "lines+markers",
                "name": name,
                "line": {"color": colour, "width": 2},
                "marker": {"size": 7, "symbol": shape, "color": colour},
                "hovertemplate": f"{name}<br>σ%{{x}} = %{{y:.3g}}<extra></extra>",
            }
        )
    notes = [
        label(1, s[0], n, xanchor="left", xshift=10, yshift=4, size=14, color=colour)
        for s, n, colour in zip(sigma, names, (WARM, BASE), strict=False)
        if len(s)
    ]
    return {
        "data": data,
        "layout": {
            "template": TEMPLATE,
            "uirevision": where,
            "annotations": notes,
            "xaxis": {"title": {"text": f"direction of {where}"}},
            "yaxis": {"title": {"text": "σ"}, "rangemode": "tozero"},
        },
    }


def similarity(layers: Mapping[str, Sequence[tuple[int, float]]], chance: float) -> Figure:
    """φ of what two adapters read, by layer, a line for each kind of matrix; chance: of random directions."""
    colours = (WARM_FILL, BASE, EDGE, WARM, MUTED)
    data: list[dict[str, Any]] = [
        {
            "x": [x for x, _ in pts],
            "y": [y for _, y in pts],
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "line": {"color": colours[i % 5], "width": 1.8, "dash": ("solid", "dash", "dot")[i // 5 % 3]},
            "marker": {"size": 5, "color": colours[i % 5], "symbol": ("circle", "diamond", "square")[i % 3]},
            "hovertemplate": f"{name} of layer %{{x}}<br>φ = %{{y:.3f}}<extra></extra>",
        }
        for i, (name, pts) in enumerate(layers.items())
    ]
    notes = [label(pts[-1][0], pts[-1][1], name, xanchor="left", size=14) for name, pts in layers.items() if pts]
    top = max([y for pts in layers.values() for _, y in pts] + [chance], default=1.0)
    return {
        "data": data,
        "layout": {
            "template": TEMPLATE,
            "uirevision": "similarity",
            "margin": {"l": 56, "r": 40, "t": 12, "b": 44},
            "xaxis": {"title": {"text": "layer"}},
            "yaxis": {"title": {"text": "φ, shared inputs"}, "range": [0, min(1.05, 1.25 * top)]},
            "shapes": [
                {
                    "type": "line",
                    "xref": "paper",
                    "x0": 0,
                    "x1": 1,
                    "y0": chance,
                    "y1": chance,
                    "line": {"color": EDGE, "width": 1.5, "dash": "dash"},
                }
            ],
            "annotations": [
                *notes,
                label(1, chance, f"chance {chance:.3f}", xref="paper", xanchor="right", yshift=11, size=14),
            ],
        },
    }


def _base_line(base: float | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    if base is None:
        return [], []
    line = {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": base,
        "y1": base,
        "layer": "below",
        "line": {"color": BASE, "width": 1.5, "dash": "dash"},
    }
    return [line], [label(1, base, "base model", xref="paper", xanchor="right", yshift=11)]


def _range(values: Sequence[float | None]) -> list[float]:
    known = [v for v in values if v is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    room = 0.12 * (high - low) or 0.5
    return [max(0.0, low - room), high + 1.6 * room]
