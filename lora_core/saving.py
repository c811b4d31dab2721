"""Writing an adapter in PEFT's directory format (files.py reads it), and any file whole or not at all.

What PEFT reads is the same function: slices of a fused module as one block adapter of it (with DoRA, the rows of none
get B = 0 and their own length as magnitude); experts as `target_parameters`, of one rank by directions of zero; a mask
folded into B without the closed directions; a tied matrix as `ensure_weight_tying`, with the factors of each module
that uses it; norms and full modules as `modules_to_save`; vectors of other modules as `bias`.

PEFT has no words for: bottlenecks and prefixes; a module trained in full that is also adapted, or of which only some
parameters are trained; a module that PEFT's rule for names (any path that ends so) cannot tell from another one. Such
an adapter gets the peft_type LORA_LAB, which PEFT refuses and this library reads. DoRA beside experts it refuses by
itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor, nn

from lora_core.errors import UserError
from lora_core.home import write
from lora_core.peft_format import CONFIG, EXPERTS, LAB, NO_TARGET, OURS, PREFIX, WEIGHTS

if TYPE_CHECKING:
    from lora_core.adapter import Adapter
    from lora_core.sites import Site

RENAMED = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")  # what PEFT takes for experts, in a mixture


@dataclass
class Written:
    """What goes into the files: tensors by PEFT's names, ranks and scalings by what PEFT looks them up with."""

    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    modules: dict[str, tuple[int, float]] = field(default_factory=dict)
    parameters: dict[str, tuple[int, float]] = field(default_factory=dict)
    listed: list[dict[str, Any]] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    bias: str = "none"
    tied: bool = False
    unsaid: str | None = None  # what PEFT cannot say

    def put(self, path: str, **pieces: np.ndarray) -> None:
        self.tensors |= {f"{PREFIX}{path}.{n.replace('__', '.')}": np.ascontiguousarray(v) for n, v in pieces.items()}


def save_adapter(adapter: Adapter, folder: str | Path, info: Mapping[str, Any]) -> Path:
    """Write an adapter so that PEFT and this library compute the same with it; in float32.

    Each file is written whole before it takes its name, so that a reader never sees half of one.
    Raises UserError when the folder cannot be written.
    """
    from safetensors.numpy import save

    from lora_core.methods.added import acts, by_host

    folder = Path(folder)
    w = Written()
    by_weight: dict[tuple[str, str], list[Site]] = {}
    for s in adapter.sites.values():
        by_weight.setdefault((s.path, s.param), []).append(s)
    mixture = not adapter.spec.dora and any(m is not None and m.ndim == 3 for module in adapter.model.modules()
                                            for n, m in module._parameters.items() if n in EXPERTS)  # fmt: skip
    for sites in by_weight.values():
        if sites[0].expert is None:
            _put_module(w, adapter, sites, mixture)
        else:
            _put_experts(w, adapter, sites, [p for _, p in by_weight if (sites[0].path, p) in by_weight])
    order = {key: i for i, key in enumerate(adapter.sites)}
    w.listed.sort(key=lambda d: order[d["key"]])
    _put_copies(w, adapter)
    for (path, kind), values in by_host(adapter.added).items():
        w.put(path, **{f"{kind}__{n}": numbers(v) for n, v in values.items()})
        w.unsaid = f"a {kind} of this library's"
    config = _peft_config(adapter, w, info)
    fresh = not any(v.any() for n, v in w.tensors.items() if n.endswith(("lora_B.weight", "lora_embedding_A")))
    lab = {"format": 2, "spec": adapter.spec.to_dict(), "sites": w.listed, "info": dict(info),
           "copies": [n.removeprefix(PREFIX).replace(".base_layer.", ".") for n in w.tensors if ".lora_" not in n],
           "fresh": fresh and not _copies_changed(adapter) and not acts(adapter.added)}  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / WEIGHTS, save(w.tensors, metadata={"format": "pt"}))
        write(folder / CONFIG, json.dumps(config, indent=2).encode())
        write(folder / LAB, json.dumps(lab, indent=1, ensure_ascii=False).encode())
    except OSError as e:
        raise UserError(f"cannot write the adapter to {folder}: {e.strerror or e}") from None
    return folder


# ---- factors -----------------------------------------------------------------------------------------------------
def _block(w: Written, adapter: Adapter, sites: list[Site], scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(A (n, in), B (all rows of the weight, n)) of the slices of one matrix, all with the scaling `scale`."""
    pairs = []
    for s in sites:
        f = adapter.factors(s.key)
        b, a = (numbers(p) for p in f.factored())
        pairs.append((a, b if f.scaling == scale else b * (f.scaling / scale)))
        w.listed.append({"key": s.key, "path": s.path, "target": s.target, "layer": s.layer, "rank": b.shape[1],
                         "scaling": f.scaling, "layout": s.layout, "also": s.also, "param": s.param,
                         "expert": s.expert})  # fmt: skip
    A = np.concatenate([a for a, _ in pairs])
    B, col = np.zeros((sites[0].full, len(A)), np.float32), 0
    for s, (a, b) in zip(sites, pairs, strict=True):
        B[s.layout.rows() if s.layout else slice(None), col : col + len(a)] = b
        col += len(a)
    return A, B


def _put_module(w: Written, adapter: Adapter, sites: list[Site], mixture: bool) -> None:
    first = sites[0]
    scale = max(adapter.factors(s.key).scaling for s in sites)
    A, B = _block(w, adapter, sites, scale)
    for path in (first.path, *first.also):
        if isinstance(adapter.model.get_submodule(path), nn.Embedding):
            w.put(path, lora_embedding_A=A, lora_embedding_B=B)
        elif first.lookup:
            w.put(path, lora_A__weight=B.T, lora_B__weight=A.T)
        else:
            w.put(path, lora_A__weight=A, lora_B__weight=B)
        # with experts about, PEFT takes these names for theirs, unless they come as parameters
        if mixture and path.rpartition(".")[2] in RENAMED:
            w.parameters[f"{path}.weight"] = len(A), scale
        else:
            w.modules[path] = len(A), scale
    w.tied |= bool(first.also)
    if adapter.spec.dora:
        m = numbers(_whole_W0(adapter, first).norm(dim=1))
        for s in sites:
            own = adapter.factors(s.key).m
            assert own is not None
            m[s.layout.rows() if s.layout else slice(None)] = numbers(own)
        w.put(first.path, lora_magnitude_vector=m)


def _whole_W0(adapter: Adapter, site: Site) -> Tensor:
    """W0 (out, in) of all rows of the weight that a site is a slice of, as it was before any merge."""
    from lora_core.merging import wide
    from lora_core.quantised import Bits
    from lora_core.registry import book_of
    from lora_core.sites import plain_weight

    module = adapter.model.get_submodule(site.path)
    kept = book_of(adapter.model).kept.get(cast(nn.Parameter, module._parameters[site.param]))
    W = plain_weight(module, site.param) if kept is None else kept.plain if isinstance(kept, Bits) else kept
    return wide(W.detach().T if site.transposed else W.detach())


def _put_experts(w: Written, adapter: Adapter, sites: list[Site], params: list[str]) -> None:
    """The experts of one parameter, of which PEFT wants all, with one rank."""
    first = sites[0]
    module = adapter.model.get_submodule(first.path)
    order = [p for p in module._parameters if p in params]
    if order != [p for p in EXPERTS if p in params]:
        w.unsaid = f"whose factors are whose, where {first.path} has its parameters in an order of its own"
    scale = max(adapter.factors(s.key).scaling for s in sites)
    experts: dict[int, list[Site]] = {}
    for s in sites:
        experts.setdefault(s.expert or 0, []).append(s)
    blocks = {e: _block(w, adapter, mine, scale) for e, mine in experts.items()}
    r, n = max(len(A) for A, _ in blocks.values()), len(getattr(module, first.param))
    A, B = np.zeros((n, r, first.in_), np.float32), np.zeros((first.full, r, n), np.float32)
    for e, (a, b) in blocks.items():
        A[e, : len(a)], B[:, : len(a), e] = a, b
    depth = len(order) - 1 - order.index(first.param)
    w.put(first.path + ".base_layer" * depth, lora_A__weight=A.reshape(n * r, -1), lora_B__weight=B.reshape(-1, r * n))
    w.parameters[f"{first.path}.{first.param}"] = r, scale


def numbers(p: Tensor) -> np.ndarray:
    """As float32, a copy."""
    return p.detach().cpu().float().numpy().copy()


# ---- what is trained itself --------------------------------------------------------------------------------------
def _put_copies(w: Written, adapter: Adapter) -> None:
    """Copies under PEFT's names: modules that are saved whole, and biases."""
    from lora_core.selection import find_direct

    if not adapter.copies:
        return
    adapted = {p for s in adapter.sites.values() for p in (s.path, *s.also)}
    given: dict[str, dict[str, np.ndarray]] = {}
    for name, places in find_direct(adapter.model, adapter.spec).items():
        for path, param in places:
            given.setdefault(path, {})[param] = numbers(adapter.copies[name])
    biases = []
    for path, values in given.items():
        if path not in adapted and values.keys() == adapter.model.get_submodule(path).state_dict().keys():
            w.saved.append(path)
        elif values.keys() == {"bias"}:
            biases.append(path)
        else:
            w.unsaid = f"{', '.join(sorted(values))} of {path} trained themselves" + (
                ", which is adapted too" if path in adapted else " and other parts of it not")  # fmt: skip
        inner = ".base_layer" if path in adapted else ""
        w.put(path + inner, **values)
    if biases:
        w.bias = "lora_only" if adapted.issuperset(biases) else "all"
    paths = [p for p, _ in adapter.model.named_modules(remove_duplicate=False) if ".lora" not in f".{p}"]
    more = [p for p in paths if p not in w.saved and any(p.endswith(n) for n in w.saved)]
    if more:
        w.unsaid = f"that {more[0]} is not meant by the name of another module that ends the same"


def _copies_changed(adapter: Adapter) -> bool:
    for name, copy in adapter.copies.items():
        path, _, param = name.rpartition(".")
        own = adapter.model.get_submodule(path)._parameters[param]
        if own is None or not bool((copy.to(own.dtype) == own).all()):
            return True
    return False


# ---- the config --------------------------------------------------------------------------------------------------
def _peft_config(adapter: Adapter, w: Written, info: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json."""
    spec = adapter.spec
    root = spec.scaling == "alpha/sqrt(r)"
    ranks = {n: r for n, (r, _) in (w.modules | w.parameters).items()}
    alphas = {n: s * (math.sqrt(r) if root else r) for n, (r, s) in (w.modules | w.parameters).items()}
    r, alpha = next(iter(ranks.values()), spec.rank), next(iter(alphas.values()), spec.alpha)
    model_config = getattr(adapter.model, "config", None)
    architecture = type(adapter.model).__name__
    return {
        "peft_type": "LORA" if w.unsaid is None else OURS,
        **({} if w.unsaid is None else {"not_for_peft": f"PEFT has no words for {w.unsaid}"}),
        "task_type": "CAUSAL_LM" if architecture.endswith(("ForCausalLM", "LMHeadModel")) else None,
        "base_model_name_or_path": info.get("model") or getattr(model_config, "_name_or_path", None) or None,
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": root,
        "use_dora": spec.dora,
        "lora_dropout": 0.0 if w.parameters else spec.dropout,  # PEFT has none for parameters
        "rank_pattern": {f"^{n}": v for n, v in ranks.items() if v != r},
        "alpha_pattern": {f"^{n}": v for n, v in alphas.items() if v != alpha},
        "target_modules": _shortest(adapter.model, list(w.modules)) if ranks else NO_TARGET,
        "target_parameters": list(w.parameters) or None,
        "fan_in_fan_out": any(s.transposed and not s.lookup and s.expert is None for s in adapter.sites.values()),
        "bias": w.bias,
        "modules_to_save": w.saved or None,
        "ensure_weight_tying": w.tied,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _shortest(model: nn.Module, paths: list[str]) -> list[str]:
    """Names that PEFT's rule (a dotted end of the path) turns into exactly these modules: short ones where they do."""
    every = [n for n, _ in model.named_modules()]
    for parts in (1, 2):
        names = list(dict.fromkeys(".".join(p.split(".")[-parts:]) for p in paths))
        if {n for n in every if any(n == e or n.endswith("." + e) for e in names)} == set(paths):
            return names
    return paths
