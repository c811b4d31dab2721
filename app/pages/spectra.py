"""Spectra: layer by matrix, and one matrix's singular values. Read from the adapter's files; needs no model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from app import figures
from app.pages import sources, words, words_spectra
from app.pages.lab import Lab, title
from app.pages.sources import Source, source
from app.pages.train import grid, where
from lora_core.errors import UserError
from lora_core.families import TITLES
from lora_core.spectra import Spectrum

MATRIX = re.compile(r"(?:layers\.)?(\d{1,5})\.([\w-]{1,40})")
SEED = 0  # of the random update
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
    found = s.looked.spectra
    if not found:
        return base | {"error": f"{s.name} has no low-rank updates: all that it changes is trained itself"}
    measures = {}
    for name, text in MEASURES.items():
        values = grid({k: getattr(x, name) for k, x in found.items()})
        measures[name] = {"title": text, "values": values, "say": words.heat(values, name),
                          "figure": figures.heatmap(values, text, norm=name == "norm")}  # fmt: skip
    top = max(found, key=lambda k: found[k].norm)
    word = {address(k): w for k, w in s.looked.words.items()}
    return base | s.key | {
        "name": s.name, "base": s.base, "measures": measures, "first": address(top),
        "rank": max(x.rank for x in found.values()), "words": word, "rules": words_spectra.rules(),
        "sigma1": grid({k: max(x.singular_values, default=0.0) for k, x in found.items()}),
        "verdicts": words_spectra.verdicts(list(word.values())),
    }  # fmt: skip


def one(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """The spectrum of one matrix, `m` = "layers.12.v", with its picture, beside a random update of the same norm."""
    s = source(lab, query)
    key, x = pick(s, query.get("m", ""))
    return s.key | shown(s, key, x)


def pick(s: Source, m: str) -> tuple[str, Spectrum]:
    """(key, spectrum) of the matrix that the page calls "layers.12.v"."""
    asked = MATRIX.fullmatch(m)
    if not asked:
        raise UserError(f"'{m[:60]}' names no matrix; an example is layers.12.v")
    layer, name = int(asked[1]), asked[2]
    for key, x in s.looked.spectra.items():
        if where(key) == (layer, name):
            return key, x
    raise UserError(f"{name} of layer {layer} was frozen in {s.name}: there is no update to look at")


def shown(s: Source, key: str, x: Spectrum, *, base: Any = ()) -> dict[str, Any]:
    """One spectrum as the page draws it. base: the singular values of W0, where they are known."""
    from lora_core.spectra import energy, energy_rank, same_norm_random

    layer, name = where(key)
    null = same_norm_random(x.shape[0], x.shape[1], x.rank, x.norm, seed=SEED)
    share, null_share = energy(x.singular_values), energy(null)
    needed = energy_rank(null_share, 0.9) if x.norm else 0
    sigma = [float(v) for v in x.singular_values]
    behind = [float(v) for v in np.asarray(base, float)[: len(sigma)]]
    head = ["direction", "sigma", "sigma of a random update", "energy", "energy of a random update"]
    columns = [sigma, null.tolist(), share.tolist(), null_share.tolist()]
    if behind:
        head, columns = [*head, "sigma of W0"], [*columns, [*behind, *[None] * (len(sigma) - len(behind))]]
    return {
        "m": address(key),
        "title": f"layer {layer}, {name}" + (f" ({TITLES[name]})" if name in TITLES and TITLES[name] != name else ""),
        "path": x.path,
        "shape": list(x.shape),
        "rank": x.rank,
        "sigma": sigma,
        "figure": figures.spectrum(sigma, share.tolist(), null.tolist(), null_share.tolist(), needed=x.energy_90,
                                   base=behind, log=True),
        "say": words.spectrum(x.energy_90, needed, x.rank),
        "word": s.looked.words[key],
        "facts": [["‖ΔW‖", words.short(x.norm)], ["σ₁", words.short(sigma[0] if sigma else 0.0)],
                  ["effective rank", f"{x.stable_rank:.1f} of {x.rank}"]],
        "more": words_spectra.more(x, next(m for m in s.looked.audit.matrices if m.path == key)),
        "rows": [head, *([i, *values] for i, values in enumerate(zip(*columns), 1))],
    }  # fmt: skip


def address(key: str) -> str:
    """How a matrix is named in the page's address."""
    layer, target = where(key)
    return f"layers.{layer}.{target}"


__all__ = ["heat", "one", "sources"]
