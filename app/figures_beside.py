"""Figures of an update beside its W0 and beside another update: plain dictionaries, as in `figures`."""

from __future__ import annotations

from collections.abc import Sequence

from app.figures import BASE, EDGE, TEMPLATE, WARM, WARM_FILL, Figure, label


def inside(read: Sequence[float], write: Sequence[float], sides: tuple[int, int], k: int) -> Figure:
    """How much of an update's first k directions lies within W0's first 1, 2, …: φ (section 7.2), and random ones' φ.

    read, write  φ on the side that reads (right-singular vectors) and that writes (left), for 1, 2, … directions of W0
    sides        (in, out): the sizes of both spaces, which random directions fill evenly
    """
    n = max(len(read), len(write))
    every = max(1, n // 300)
    at = [j for j in range(1, n + 1) if j % every == 0 or j in (1, n)]

    def line(phi: Sequence[float], name: str, color: str, dash: str) -> dict[str, object]:
        x = [j for j in at if j <= len(phi)]
        return {"x": x, "y": [100 * phi[j - 1] for j in x], "type": "scatter", "mode": "lines", "name": name,
                "line": {"color": color, "width": 2.5, "dash": dash},
                "hovertemplate": f"{name}<br>W0's first %{{x}}: %{{y:.0f}} %<extra></extra>"}  # fmt: skip

    chance = [{"x": at, "y": [100 * min(1.0, max(j, k) / side) for j in at], "type": "scatter", "mode": "lines",
               "name": name, "line": {"color": EDGE, "width": 1.5, "dash": "dot"},
               "hovertemplate": "random directions<br>W0's first %{x}: %{y:.0f} %<extra></extra>"}
              for side, name in dict(zip(sides, ("random", "random, written"))).items()]  # fmt: skip
    mid = at[len(at) // 2]
    ys = [100 * phi[min(mid, len(phi)) - 1] for phi in (read, write)]
    up = 1 if ys[0] > ys[1] else -1  # each name on its line's own side
    return {
        "data": [*chance, line(write, "what it writes", BASE, "dash"), line(read, "what it reads", WARM_FILL, "solid")],
        "layout": {
            "template": TEMPLATE,
            "uirevision": "inside",
            "margin": {"l": 60, "r": 12, "t": 8, "b": 44},
            "xaxis": {"title": {"text": f"W0's strongest directions (of {n})"}, "range": [0, n]},
            "yaxis": {"title": {"text": "ΔW's inside (%)"}, "range": [0, 104], "dtick": 50},
            "annotations": [
                label(mid, ys[0], "<b>reads</b>", color=WARM, yshift=15 * up, xshift=-24 * up),
                label(mid, ys[1], "<b>writes</b>", color=BASE, yshift=-15 * up, xshift=24 * up),
                label(n, 100 * min(1.0, n / max(sides)), "random", xanchor="right", yshift=-22, size=14),
            ],
        },
    }  # fmt: skip
