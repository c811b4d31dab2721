"""Spectra: layer by matrix, and one matrix's singular values. Read from the adapter's files; needs no model."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from app import figures
from app.pages import words
from app.pages.lab import Lab, title
from app.pages.train import grid, where
from app.runs.run import Run
from lora_core.errors import UserError
from lora_core.families import TITLES

MATRIX = re.compile(r"(?:layers\.)?(\d{1,5})\.([\w-]{1,40})")
KEPT = 8  # runs whose spectra are kept in memory
SEED = 0  # of the random update
MEASURES = {"norm": "‖ΔW‖", "stable_rank": "effective rank"}
_kept: OrderedDict[tuple[Any, ...], dict[str, Any]] = OrderedDict()
_lock = threading.Lock()


def of_run(run: Run) -> dict[str, Any]:
    """{key: Spectrum} of a run's adapter; UserError when it has none yet."""
    from lora_core.files import read_adapter
    from lora_core.spectra import spectra

    if run.adapter is None:
        why = "is still training; its spectra come when it has ended" if run.live else "ended without an adapter"
        raise UserError(f"{title(run)} {why}")
    file = run.adapter / "adapter_model.safetensors"
    try:
        key = (str(run.adapter), file.stat().st_mtime_ns)
    except OSError:
        raise UserError(f"the adapter of {title(run)} is no longer there") from None
    with _lock:
        if key not in _kept:
            _kept[key] = dict(spectra(read_adapter(run.adapter)))
            while len(_kept) > KEPT:
                _kept.popitem(last=False)
        _kept.move_to_end(key)
        return _kept[key]


def heat(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """All measures of all matrices of a run, each with its sentence; and which matrix to begin with."""
    run = lab.run(query.get("run"))
    base = {"run": run.id, "name": title(run), "recorded": run.recorded, "live": run.live}
    try:
        found = of_run(run)
    except UserError as error:
        return base | {"error": str(error)}
    measures = {}
    for name, text in MEASURES.items():
        values = grid({k: getattr(s, name) for k, s in found.items()})
        measures[name] = {"title": text, "values": values, "say": words.heat(values, name),
                          "figure": figures.heatmap(values, text, norm=name == "norm")}  # fmt: skip
    top = max(found, key=lambda k: found[k].norm)
    return base | {"measures": measures, "first": address(top), "rank": max(s.rank for s in found.values())}


def one(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """The spectrum of one matrix, `m` = "layers.12.v", with its picture, beside a random update of the same norm."""
    from lora_core.spectra import energy, energy_rank, same_norm_random

    run = lab.run(query.get("run"))
    asked = MATRIX.fullmatch(query.get("m", ""))
    if not asked:
        raise UserError(f"'{query.get('m', '')[:60]}' names no matrix; an example is layers.12.v")
    layer, name = int(asked[1]), asked[2]
    s = next((s for k, s in of_run(run).items() if where(k) == (layer, name)), None)
    if s is None:
        raise UserError(f"{name} of layer {layer} was frozen in {title(run)}: there is no update to look at")
    null = same_norm_random(s.shape[0], s.shape[1], s.rank, s.norm, seed=SEED)
    share, null_share = energy(s.singular_values), energy(null)
    needed = energy_rank(null_share, 0.9) if s.norm else 0
    sigma = [float(v) for v in s.singular_values]
    rows: list[list[Any]] = [["direction", "sigma", "sigma of a random update", "energy", "energy of a random update"]]
    columns = (sigma, null.tolist(), share.tolist(), null_share.tolist())
    rows += [[i, *values] for i, values in enumerate(zip(*columns), 1)]
    return {
        "run": run.id,
        "m": f"layers.{layer}.{name}",
        "title": f"layer {layer}, {name}" + (f" ({TITLES[name]})" if name in TITLES and TITLES[name] != name else ""),
        "path": s.path,
        "shape": list(s.shape),
        "rank": s.rank,
        "sigma": sigma,
        "figure": figures.spectrum(sigma, share.tolist(), null.tolist(), null_share.tolist(), needed=s.energy_90),
        "say": words.spectrum(s.energy_90, needed, s.rank),
        "facts": [["‖ΔW‖", words.short(s.norm)], ["σ₁", words.short(sigma[0] if sigma else 0.0)],
                  ["effective rank", f"{s.stable_rank:.1f} of {s.rank}"], ["shape", f"{s.shape[0]}×{s.shape[1]}"]],
        "rows": rows,
    }  # fmt: skip


def address(key: str) -> str:
    """How a matrix is named in the page's address."""
    layer, target = where(key)
    return f"layers.{layer}.{target}"
