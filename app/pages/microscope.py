"""The microscope: one ΔW beside its W0, and the tokens that its directions read and write; from the model's files.

W0 comes from the files of a base model that is on this machine, not from the loaded one: nothing waits for a text that
is being written, and no other model is pushed out. A newer question of the same page ends an older one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from app import figures_beside
from app.pages import owners, words_spectra
from app.pages.compare import Tickets
from app.pages.lab import Lab
from app.pages.pair import over
from app.pages.sources import Source, base_files, source
from app.pages.spectra import pick, shown
from app.pages.words import short
from lora_core.errors import UserError, unknown

KEPT = 400  # answers of some 10 kB
SHOWN = 3  # directions whose tokens are shown
TICKETS = Tickets()
_kept: OrderedDict[tuple[str, str, str], dict[str, Any]] = OrderedDict()
_lock = threading.Lock()
_work = threading.Lock()  # one at a time: two full sets of BLAS threads wait for each other's turns


def look(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """W0's part for the matrix `m`, as much of it as one lens shows.

    query: run or open, m, part (spectrum: W0's singular values behind ΔW's; beside: what of W0 lies along ΔW; tokens),
    page and seq. {"stale": true} for a question that a newer one overtook, {"away"} with a sentence where the base
    model is not here or is another one.
    """
    page, seq = owners.page(query.get("page")), int(query["seq"]) if str(query.get("seq", "")).isdigit() else 0
    part = query.get("part", "spectrum")
    if part not in PARTS:
        raise unknown("lens", str(part)[:40], PARTS)
    TICKETS.take(page, seq)
    s = source(lab, query)
    key, x = pick(s, query.get("m", ""))
    place = (s.stamp, key, part)
    with _lock:
        known = _kept.get(place)
    if known is None:
        try:
            base = base_files(s.base)
            with _work:
                if TICKETS.stale(page, seq):
                    return {"stale": True}
                known = PARTS[part](s, key, x, base)
        except UserError as error:
            return s.key | {"m": query.get("m"), "part": part, "away": str(error)}
        with _lock:
            _kept[place] = known
            while len(_kept) > KEPT:
                _kept.popitem(last=False)
    answer = s.key | {"m": query.get("m"), "part": part} | known
    if part == "spectrum":
        answer |= shown(s, key, x, base=known["baseSigma"], other=over(lab, query, s, key))
    return answer


def behind(s: Source, key: str, x: Any, base: Any) -> dict[str, Any]:
    """W0's singular values, as many as ΔW has."""
    return {"baseSigma": s.looked.base_sigma(key, base)[: x.rank].tolist()}


def beside_W0(s: Source, key: str, x: Any, base: Any) -> dict[str, Any]:
    """Table 7's three numbers, and where ΔW's first directions lie among W0's."""
    from lora_core.beside import beside, inside, rank_of, svd

    site = s.looked.site(key, base)
    W0 = base.W0(site)
    U0, sigma0, V0 = np.linalg.svd(W0, full_matrices=False)
    U, sigma, V = svd(site.B, site.A, site.scaling)
    b = beside(U, sigma, V, W0, sigma0)
    answer: dict[str, Any] = {
        "beside": [["‖ΔW‖/‖W0‖", f"{b.norm / (b.base_norm or 1):.2%}"], ["amplification", short(b.amplification)],
                   ["overlap", f"{b.overlap:.1%}"]],
        "table": [["random directions", b.random], ["ΔW's directions", b.along], ["W0's own strongest", b.top]],
        "besideSay": words_spectra.beside(b), "directions": b.directions,
    }  # fmt: skip
    k = min(max(1, x.energy_90), rank_of(sigma, W0.shape)) if b.directions else 0
    if k:
        read, write = inside(V, V0.T, k), inside(U, U0, k)
        j = max(k, len(sigma0) // 10)
        answer["inside"] = figures_beside.inside(read.tolist(), write.tolist(), (V.shape[0], U.shape[0]), k)
        chance = max(j, k) / max(V.shape[0], U.shape[0])
        answer["insideSay"] = words_spectra.inside(float(read[j - 1]), float(write[j - 1]), chance, k, j)
    return answer


def tokens(s: Source, key: str, x: Any, base: Any) -> dict[str, Any]:
    """What the first directions read and write."""
    from lora_core.beside import svd

    site = s.looked.site(key, base)
    U, sigma, V = svd(site.B, site.A, site.scaling)
    return read_tokens(base, site, U[:, :SHOWN], sigma, V[:, :SHOWN])


def read_tokens(base: Any, site: Any, U: np.ndarray, sigma: np.ndarray, V: np.ndarray) -> dict[str, Any]:
    """The tokens of the first directions, or why there are none."""
    from lora_core.readings import Reader

    if not sigma.any():
        return {"tokens": [], "tokensSay": "This ΔW is zero: it reads and writes nothing."}
    try:
        found = Reader(base).of(site, U, V)
        names = vocabulary(base.folder)
    except UserError as error:
        return {"tokens": [], "tokensSay": f"No tokens here: {error}."}
    if not found:
        return {"tokens": [], "tokensSay": "This matrix neither reads from the residual stream nor writes into it, so "
                                           "its directions are no tokens."}  # fmt: skip
    if len(found) > 1:  # both sides have to fit beside the map
        found = [replace(r, poles=r.poles[: SHOWN - 1]) for r in found]
    tokens = [{"side": r.side, "through": r.through, "chance": r.chance,
               "poles": [[[[names(i), round(z, 2)] for i, z in zip(p.ids, p.z)] for p in ends] for ends in r.poles]}
              for r in found]  # fmt: skip
    return {"tokens": tokens, "tokensSay": words_spectra.tokens(site.target, found)}


PARTS = {"spectrum": behind, "beside": beside_W0, "tokens": tokens}


@lru_cache(maxsize=2)
def vocabulary(folder: Path) -> Any:
    """Token number to text; a piece of a character as the tokenizer writes it."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError("the model comes without a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # the package has no error class of its own
        raise UserError("the model's tokenizer.json cannot be read") from None

    def name(i: int) -> str:
        piece = tokenizer.id_to_token(i) or f"#{i}"
        if piece.startswith("▁"):
            return " " + piece[1:]
        text = tokenizer.decode([i], skip_special_tokens=False)
        return text if text and "\ufffd" not in text else piece

    return name
