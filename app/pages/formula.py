"""What the formula strip says of the frozen side: ‖W0‖ of every matrix of the loaded model."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from app.pages.lab import Lab

KEPT = 4  # models whose norms are remembered
_kept: OrderedDict[str, dict[str, list[float | None]]] = OrderedDict()
_lock = threading.Lock()


def weights(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """{"model", "norms": {matrix: [‖W0‖_F of layer 0, 1, …]}} of a model; no norms while another one is loaded.

    None stands where a layer has no matrix of that name, or several (the experts of a mixture).
    """
    name = query.get("name", "")
    with _lock:
        if name in _kept:
            return {"model": name, "norms": _kept[name]}
    with lab.session.lock:  # waits for a model that is being loaded, and swaps none out
        loaded = lab.session.loaded
        if loaded is None or loaded.name != name:
            return {"model": name, "norms": {}}
        found = norms(loaded.model)
    with _lock:
        _kept[name] = found
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    return {"model": name, "norms": found}


def norms(model: Any) -> dict[str, list[float | None]]:
    """{matrix: [‖W0‖_F by layer]} of a model, summed in float32."""
    import torch

    from lora_core.sites import find_sites

    values: dict[tuple[str, int], list[float]] = {}
    with torch.no_grad():
        for s in find_sites(model):
            if s.layer is not None:
                W0 = s.weight(model.get_submodule(s.path))
                values.setdefault((s.target, s.layer), []).append(
                    float(torch.linalg.vector_norm(W0, dtype=torch.float32)))  # fmt: skip
    layers = max((layer for _, layer in values), default=-1) + 1
    out: dict[str, list[float | None]] = {t: [None] * layers for t, _ in values}
    for (target, layer), each in values.items():
        if len(each) == 1:
            out[target][layer] = round(each[0], 4)
    return out
