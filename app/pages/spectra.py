"""Spectra: layer by matrix, and one matrix's singular values. Read from the adapter's files; needs no model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from app import figures
from app.pages import words, words_spectra
from app.pages.lab import Lab, title
from app.pages.sources import Dense, Looked, Source, source
from lora_core.errors import UserError
from lora_core.families import TARGETS, TITLES
from lora_core.spectra import Spectrum

MATRIX = re.compile(r"(?:layers\.)?(\d{1,5})\.([\w-]{1,40})")
MEASURES = {"norm": "‖ΔW‖", "stable_rank": "effective rank"}


def heat(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """All measures of all matrices, each with its sentence; the word for each; and which matrix to begin with."""
    base: dict[str, Any] = {}
    if not query.get("open"):
        run = lab.run(query.get("run"))
        base = {"run": run.id, "name": title(run), "recorded": run.recorded, "live": run.live}
    try:
        s = source(lab, query)
    except UserError as error:
        return base | {"error": str(error)}
    look = s.looked
    base |= s.key | {"name": s.name, "base": s.base, "file": s.file}
    base |= {"note": look.note} if isinstance(look, Dense) and look.note else {}
    if isinstance(look, Dense) and not look.ready:
        return base | ({"error": look.fault} if look.fault else {"pending": [len(look.spectra), look.total]})
    if not look.spectra:
        return base | {"error": f"{s.name} has no low-rank updates: all that it changes is trained itself"}
    measures = {}
    for name, text in MEASURES.items():
        values = mapped(look, {k: getattr(x, name) for k, x in look.spectra.items()})
        measures[name] = {"title": text, "values": values, "say": words.heat(values, name),
                          "figure": figures.heatmap(values, text, norm=name == "norm")}  # fmt: skip
    top = max(look.spectra, key=lambda k: look.spectra[k].norm)
    word = {address(look, k): w for k, w in look.words.items()}
    return base | {
        "measures": measures, "first": address(look, top), "rank": max(x.rank for x in look.spectra.values()),
        "words": word, "rules": words_spectra.rules(), "grades": words_spectra.grades(),
        "verdicts": words_spectra.verdicts(list(word.values())),
        "sigma1": mapped(look, {k: max(x.singular_values, default=0.0) for k, x in look.spectra.items()}),
    }  # fmt: skip


def mapped(look: Looked, values: Mapping[str, float]) -> dict[str, list[float | None]]:
    """{matrix: [value of layer 0, 1, …]}, None where nothing is adapted."""
    layers = max((layer for layer, _ in look.places.values()), default=-1) + 1
    names = sorted({n for _, n in look.places.values()}, key=lambda n: (TARGETS.index(n) if n in TARGETS else 99, n))
    out: dict[str, list[float | None]] = {n: [None] * layers for n in names}
    for key, value in values.items():
        layer, name = look.places[key]
        out[name][layer] = float(f"{value:.5g}")
    return out


def one(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """The spectrum of one matrix, `m` = "layers.12.v", with its picture, beside a random update of the same norm."""
    from app.pages.pair import over

    s = source(lab, query)
    key, x = pick(s, query.get("m", ""))
    return s.key | shown(s, key, x, other=over(lab, query, s, key))


def pick(s: Source, m: str) -> tuple[str, Spectrum]:
    """(key, spectrum) of the matrix that the page calls "layers.12.v"."""
    asked = MATRIX.fullmatch(m)
    if not asked:
        raise UserError(f"'{m[:60]}' names no matrix; an example is layers.12.v")
    layer, name = int(asked[1]), asked[2]
    for key, place in s.looked.places.items():
        if place == (layer, name):
            return key, s.looked.spectra[key]
    raise UserError(f"{name} of layer {layer} was frozen in {s.name}: there is no update to look at")


def shown(s: Source, key: str, x: Spectrum, *, base: Any = (), other: dict[str, Any] | None = None) -> dict[str, Any]:
    """One spectrum as the page draws it. base: the singular values of W0, where they are known; other: of `pair.over`,
    what is drawn over it."""
    from lora_core.spectra import energy, energy_rank

    layer, name = s.looked.places[key]
    null = s.looked.null(x)
    share, null_share = energy(x.singular_values), energy(null)
    needed = energy_rank(null_share, 0.9) if x.norm else 0
    sigma = [float(v) for v in x.singular_values]
    behind = [float(v) for v in np.asarray(base, float)[: len(sigma)]]
    head = ["direction", "sigma", "sigma of a random update", "energy", "energy of a random update"]
    columns = [sigma, null.tolist(), share.tolist(), null_share.tolist()]
    if behind:
        head, columns = [*head, "sigma of W0"], [*columns, [*behind, *[None] * (len(sigma) - len(behind))]]
    second: Spectrum | None = other["spectrum"] if other else None
    drawn = None
    if other and second is not None:
        theirs = [float(v) for v in second.singular_values]
        drawn = (other["name"], theirs, energy(np.array(theirs)).tolist())
        n = max(len(sigma), len(theirs))
        head = [*head, f"sigma of {other['name']}"]
        columns = [[*c, *[None] * (n - len(c))] for c in (*columns, theirs)]
    return {
        "m": address(s.looked, key),
        "title": titled(layer, name, x),
        "path": x.path,
        "shape": list(x.shape),
        "rank": x.rank,
        "sigma": sigma,
        "figure": figures.spectrum(sigma, share.tolist(), null.tolist(), null_share.tolist(), needed=x.energy_90,
                                   base=behind, other=drawn, log=True),
        "overSay": other["say"] if other else "",
        "say": words.spectrum(x.energy_90, needed, x.rank),
        "word": s.looked.words[key],
        "facts": [["‖ΔW‖", words.short(x.norm)], ["σ₁", words.short(sigma[0] if sigma else 0.0)],
                  ["effective rank", f"{x.stable_rank:.1f} of {x.rank}"]],
        "rankSay": f"{x.stable_rank:.1f} directions as strong as the first would have this norm" if x.norm else "",
        "more": words_spectra.more(x, next(m for m in s.looked.audit.matrices if m.path == key)),
        "rows": [head, *([i, *values] for i, values in enumerate(zip(*columns), 1))],
    }  # fmt: skip


def titled(layer: int, name: str, x: Spectrum) -> str:
    """How a matrix is called: "layer 12, v (value)"; what is no language model's has blocks, counted by us."""
    if x.layer is None:
        return name
    return f"layer {layer}, {name} ({TITLES[name]})" if name in TITLES else f"{name}, number {layer}"


def address(look: Looked, key: str) -> str:
    """How a matrix is named in the page's address."""
    layer, name = look.places[key]
    return f"layers.{layer}.{name}"
