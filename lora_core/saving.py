"""Writing an adapter in PEFT's directory format (files.py reads it), and any file whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_core.errors import UserError
from lora_core.files import CONFIG, LAB, PREFIX, WEIGHTS

if TYPE_CHECKING:
    from torch import nn

    from lora_core.adapter import Adapter


def save_adapter(adapter: Adapter, folder: str | Path, info: Mapping[str, Any]) -> Path:
    """Write an adapter so that PEFT and this library read the same ΔW; factors in float32.

    Each file is written whole before it takes its name, so that a reader never sees half of one.
    Raises UserError when the folder cannot be written.
    """
    from safetensors.numpy import save

    folder = Path(folder)
    spec, blocks, listed = adapter.spec, {}, []
    by_path: dict[str, list[str]] = {}
    for key, s in adapter.sites.items():
        by_path.setdefault(s.path, []).append(key)
    for path, keys in by_path.items():
        pairs = {}
        for k in keys:
            b, a = adapter.factors(k).factored()
            pairs[k] = (a.cpu().float().numpy(), b.cpu().float().numpy())
        scalings = {k: adapter.factors(k).scaling for k in keys}
        scale = max(scalings.values())
        A = np.concatenate([pairs[k][0] for k in keys])
        first = adapter.sites[keys[0]]
        B = np.zeros((first.full, A.shape[0]), np.float32)
        col = 0
        for k in keys:
            s, b = adapter.sites[k], pairs[k][1]
            rows = s.layout.rows() if s.layout else slice(None)
            B[rows, col : col + b.shape[1]] = b if scalings[k] == scale else b * (scalings[k] / scale)
            col += b.shape[1]
            listed.append({"key": k, "path": path, "target": s.target, "layer": s.layer, "rank": b.shape[1],
                           "scaling": scalings[k], "layout": s.layout})  # fmt: skip
        blocks[path] = (A, B, scale)
    tensors = {}
    for path, (A, B, _) in blocks.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"], tensors[f"{PREFIX}{path}.lora_B.weight"] = A, B
    lab = {"format": 1, "spec": spec.to_dict(), "sites": listed, "info": dict(info),
           "fresh": not any(B.any() for _, B, _ in blocks.values())}  # fmt: skip
    config = _peft_config(adapter, {p: (A.shape[0], s) for p, (A, _, s) in blocks.items()}, dict(info))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        write(folder / CONFIG, json.dumps(config, indent=2).encode())
        write(folder / LAB, json.dumps(lab, indent=1, ensure_ascii=False).encode())
    except OSError as e:
        raise UserError(f"cannot write the adapter to {folder}: {e.strerror or e}") from None
    return folder


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: beside it, flushed to disk, then renamed over it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _peft_config(adapter: Adapter, modules: Mapping[str, tuple[int, float]], info: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json for modules {path: (rank, scaling)}."""
    spec = adapter.spec
    root = spec.scaling == "alpha/sqrt(r)"
    alphas = {p: s * (math.sqrt(r) if root else r) for p, (r, s) in modules.items()}
    r, alpha = next((r, alphas[p]) for p, (r, _) in modules.items())
    model_config = getattr(adapter.model, "config", None)
    architecture = type(adapter.model).__name__
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if architecture.endswith(("ForCausalLM", "LMHeadModel")) else None,
        "base_model_name_or_path": info.get("model") or getattr(model_config, "_name_or_path", None) or None,
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": root,
        "lora_dropout": spec.dropout,
        "rank_pattern": {f"^{p}": n for p, (n, _) in modules.items() if n != r},
        "alpha_pattern": {f"^{p}": a for p, a in alphas.items() if a != alpha},
        "target_modules": _shortest(adapter.model, list(modules)),
        "fan_in_fan_out": any(s.transposed for s in adapter.sites.values()),
        "bias": "none",
        "modules_to_save": None,
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
