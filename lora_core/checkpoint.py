"""Checkpoints of a run: all that its next step depends on, so that it goes on as if it had never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_core.errors import UserError

if TYPE_CHECKING:
    from lora_core.adapter import Adapter
    from lora_core.train import TrainConfig


def save_checkpoint(
    file: Path,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    objective: str,
    step: int,
    tokens: int,
    train_s: float,
    base_loss: float | None,
) -> None:
    from safetensors.torch import save

    from lora_core.saving import write

    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    for key in adapter.sites:
        f = adapter.factors(key)
        if f.A0 is not None and f.B0 is not None:
            tensors |= {f"{key}|A0": f.A0, f"{key}|B0": f.B0}
    for name, p in adapter.named_parameters():
        if not p.requires_grad:
            tensors[f"{name}|p"] = p
            continue
        tensors[f"{name}|p"] = p.detach()
        state = optimizer.state.get(p)
        if not state:  # no gradient has reached it yet
            continue
        tensors |= {
            f"{name}|m": state["exp_avg"],
            f"{name}|v": state["exp_avg_sq"],
            f"{name}|t": torch.as_tensor(state["step"]).reshape(1),
        }
    meta = {"step": step, "tokens": tokens, "train_s": train_s, "base_loss": base_loss, "config": config.to_dict(),
            "objective": objective}  # fmt: skip
    try:
        write(file, save({k: v.contiguous().cpu() for k, v in tensors.items()}, {"state": json.dumps(meta)}))
    except OSError as e:
        raise UserError(f"cannot write the checkpoint {file}: {e.strerror or e}") from None


def restore_checkpoint(
    file: Path, adapter: Adapter, optimizer: torch.optim.Optimizer, config: TrainConfig, objective: str
) -> tuple[int, int, float, float | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "pt") as f:
            meta = json.loads((f.metadata() or {})["state"])
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError, KeyError, ValueError) as e:
        raise UserError(f"the checkpoint {file} cannot be read ({e}); delete it to start again") from None
    now = {"objective": objective, **config.to_dict()}
    then = {"objective": "lm", **type(config)().to_dict(), **meta["config"], **meta}  # of a version with fewer settings
    free = ("dtype", "device", "checkpoint_every", "norms_every")
    changed = next((k for k, v in now.items() if k not in free and then[k] != v), None)
    if changed:
        raise UserError(
            f"the checkpoint {file} was made with another {changed}: {then[changed]!r}, not {now[changed]!r}"
        )
    with torch.no_grad():
        for key in adapter.sites:
            if f"{key}|A0" in tensors:
                adapter.factors(key).anchor(tensors[f"{key}|A0"], tensors[f"{key}|B0"])
        for name, p in adapter.named_parameters():
            p.copy_(tensors[f"{name}|p"])
            if f"{name}|t" not in tensors:
                continue
            optimizer.state[p] = {
                "step": tensors[f"{name}|t"].reshape(()),
                "exp_avg": tensors[f"{name}|m"].to(p.device),
                "exp_avg_sq": tensors[f"{name}|v"].to(p.device),
            }
    torch.set_rng_state(tensors["rng"])
    return meta["step"], meta["tokens"], meta["train_s"], meta["base_loss"]
