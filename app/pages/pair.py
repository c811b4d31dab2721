"""Two adapters in Spectra: where their updates read the same directions, layer by layer, beside chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from app.pages import words_spectra
from app.pages.lab import Lab
from app.pages.sources import Dense, Source, named, source
from app.pages.spectra import mapped
from lora_core.errors import UserError

KS = (1, 2, 4, 8, 16)  # how many of the first directions; the smaller rank is the last one
MOST = 64  # directions that are kept of one matrix


def pair(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """φ of every matrix that both have, for the first 1, 2, 4 … directions: values, control and sentence by matrix.

    query: run or open, and with: "14" for a run, else the id of what was opened
    """
    from lora_core.similar import chance

    one, two = source(lab, query), second(lab, query)
    if isinstance(one.looked, Dense) or isinstance(two.looked, Dense):
        raise UserError("φ is measured between low-rank updates; a whole model's difference, as DoRA's, has all of its"
                        " directions")  # fmt: skip
    found: dict[str, np.ndarray] = {}
    chances: dict[str, tuple[int, int]] = {}
    there = {place: key for key, place in two.looked.places.items()}
    for key, place in one.looked.places.items():
        other = there.get(place)
        if other is None or one.looked.spectra[key].shape[1] != two.looked.spectra[other].shape[1]:
            continue
        found[key] = phi(one, key, two, other)
        chances[place[1]] = (one.looked.spectra[key].shape[1], len(found[key]))
    if not found:
        raise UserError(f"{one.name} and {two.name} share no matrix of one name, layer and size")
    longest = max(map(len, found.values()))
    ks = [k for k in (*KS, longest) if k <= longest]
    shown = {}
    for k in dict.fromkeys(ks):
        values = mapped(one.looked, {key: float(p[min(k, len(p)) - 1]) for key, p in found.items() if len(p)})
        control = {n: chance(in_, min(k, r)) for n, (in_, r) in chances.items()}
        shown[str(k)] = {"values": values, "control": {n: c[0] for n, c in control.items()},
                         "say": {n: words_spectra.alike(n, [x for x in values[n] if x is not None], k, control[n],
                                                        one.name, two.name) for n in control}}  # fmt: skip
    same = one.seed is not None and one.seed == two.seed and one.name != two.name
    return one.key | {"with": query.get("with"), "name": two.name, "ks": list(shown), "phi": shown,
                      "note": words_spectra.SAME_DRAW if same else ""}  # fmt: skip


def second(lab: Lab, query: Mapping[str, Any]) -> Source:
    """The adapter that is set beside."""
    return source(lab, named(str(query.get("with", ""))))


def phi(one: Source, key: str, two: Source, other: str) -> np.ndarray:
    """φ(k, k) of what two updates read: their right-singular vectors, as the paper takes A's."""
    from lora_core.similar import alike

    return alike(directions(one, key), directions(two, other))


def directions(s: Source, key: str) -> np.ndarray:
    from lora_core.beside import rank_of, svd

    site = s.looked.sites[key]
    _, sigma, V = svd(site.B, site.A, site.scaling)
    return V[:, : min(MOST, rank_of(sigma, s.looked.spectra[key].shape))]


def over(lab: Lab, query: Mapping[str, Any], s: Source, key: str) -> dict[str, Any] | None:
    """The same matrix of the second adapter, for the figure and its sentence; None where it has none."""
    if not query.get("with"):
        return None
    try:
        two = second(lab, query)
    except UserError:
        return None
    place = s.looked.places[key]
    other = next((k for k, p in two.looked.places.items() if p == place), None)
    if other is None or not two.looked.ready:
        return {"name": two.name, "spectrum": None, "say": f"{two.name} has no update of this matrix."}
    x, y = s.looked.spectra[key], two.looked.spectra[other]
    first = None
    if not (isinstance(s.looked, Dense) or isinstance(two.looked, Dense)) and x.shape[1] == y.shape[1]:
        found = phi(s, key, two, other)
        first = float(found[0]) if len(found) else None
    return {"name": two.name, "spectrum": y, "say": words_spectra.overlay(two.name, x, y, first)}
