"""Which rank for which matrix, so that a file of given size keeps the most of Σσ². Numpy alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST = 1000  # partial choices that are followed at once


def allocate(gains: Sequence[np.ndarray], costs: Sequence[np.ndarray], budget: float) -> list[int]:
    """k of every matrix with the largest Σ gains[i][k] at Σ costs[i][k] ≤ budget; [] where not even k = 0 fits.

    gains[i], costs[i] (r+1,): what keeping k = 0 … r directions is worth and takes; both must not fall with k.

    First greedily, by gain per cost along the upper hull of each matrix's points. That is at most one step short of the
    best, so then all choices are followed matrix by matrix of which no other is both cheaper and better, and which,
    filled up with fractions of steps (the linear bound), could still beat the best found so far. (A multiple-choice
    knapsack, by Nemhauser and Ullmann's dominance with Dyer's bound.) Exact as long as at most 1,000 such choices are
    alive at once, beyond that the most promising are kept.
    """
    n = len(gains)
    room = budget - sum(float(c[0]) for c in costs)
    if room < 0:
        return []
    total = sum(float(g[-1] - g[0]) for g in gains) or 1.0
    G = [np.asarray(g - g[0], float) / total for g in gains]
    C = [np.asarray(c - c[0], float) for c in costs]
    steps = sorted(((dg / dc if dc else np.inf, i, k, dc, dg) for i in range(n) for k, dc, dg in _hull(G[i], C[i])),
                   key=lambda s: -s[0])  # fmt: skip
    best, found = _greedy(steps, n, room)
    owner = np.array([s[1] for s in steps], int)
    step_cost, step_gain = np.array([s[3] for s in steps]), np.array([s[4] for s in steps])
    cost, gain = np.zeros(1), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []  # for each matrix: which choice before it, and its k
    for i in range(n):
        later = owner > i
        x = np.concatenate([[0.0], np.cumsum(step_cost[later])])
        y = np.concatenate([[0.0], np.cumsum(step_gain[later])])
        c = (cost[:, None] + C[i]).ravel()
        g = (gain[:, None] + G[i]).ravel()
        bound = g + np.interp(room - c, x, y)
        alive = np.flatnonzero((c <= room) & (bound > found + 1e-12))
        if len(alive) > MOST:
            alive = alive[np.argsort(-bound[alive], kind="stable")[:MOST]]
        alive = alive[np.lexsort((-g[alive], c[alive]))]
        before = np.concatenate([[-1.0], np.maximum.accumulate(g[alive])[:-1]]) if len(alive) else g[alive]
        alive = alive[g[alive] > before]
        if not len(alive):
            return best
        trail.append((alive // len(C[i]), alive % len(C[i])))
        cost, gain = c[alive], g[alive]
    at = int(np.argmax(gain))
    for i in range(n - 1, -1, -1):
        parents, ks = trail[i]
        best[i], at = int(ks[at]), int(parents[at])
    return best


def _hull(G: np.ndarray, C: np.ndarray) -> list[tuple[int, float, float]]:
    """(k, cost, gain) of the steps along the upper hull of the points (C, G), steepest first."""
    hull = [0]
    for k in range(1, len(G)):
        if G[k] <= G[hull[-1]]:
            continue
        while len(hull) > 1 and (G[k] - G[hull[-1]]) * (C[hull[-1]] - C[hull[-2]]) >= (
            (G[hull[-1]] - G[hull[-2]]) * (C[k] - C[hull[-1]])
        ):
            hull.pop()
        hull.append(k)
    return [(k, float(C[k] - C[j]), float(G[k] - G[j])) for j, k in zip(hull, hull[1:])]


def _greedy(steps: Sequence[tuple[float, int, int, float, float]], n: int, room: float) -> tuple[list[int], float]:
    """(k of every matrix, their gain): the steepest steps first, as long as they fit."""
    ks, gain, closed = [0] * n, 0.0, set()
    for _, i, k, dc, dg in steps:
        if i in closed or dc > room:
            closed.add(i)
            continue
        ks[i], gain, room = k, gain + dg, room - dc
    return ks, gain
