"""Checkpoints of a run: all that its next step depends on, so that it goes on as if it had never stopped."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_core.errors import UserError
from lora_core.home import WHY
from lora_core.sealed import Checkpoint, newest, save_sealed

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
            "objective": objective, "machine": bits_depend_on()}  # fmt: skip
    try:
        save_sealed(file, {k: v.contiguous().cpu() for k, v in tensors.items()}, meta)
    except OSError as e:
        why = WHY.get(e.errno or 0, e.strerror or e)
        raise UserError(f"cannot write the checkpoint {file}: {why}; what was there before still is") from None


def bits_depend_on() -> dict[str, Any]:
    """What the last digits of a training on a CPU depend on."""
    from lora_core.machine import fingerprint

    return {k: v for k, v in fingerprint().items() if k in ("chip", "threads", "torch")}


def find_checkpoint(file: Path) -> Checkpoint | None:
    """The last whole checkpoint, or None where there never was one. UserError when what is there is damaged."""
    found = newest(file)
    if found is None and os.path.lexists(file):
        raise UserError(f"the checkpoint {file} cannot be read: it is torn or damaged; delete it to start again")
    return found


def restore_checkpoint(
    found: Checkpoint, adapter: Adapter, optimizer: torch.optim.Optimizer, config: TrainConfig, objective: str
) -> tuple[int, int, float, float | None, str | None]:
    """(step, tokens, train_s, base_loss, a remark) of the checkpoint that training goes on from."""
    from safetensors import SafetensorError, safe_open

    file, meta = found.path, found.state
    try:
        with safe_open(str(file), "pt") as f:
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as e:
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
                "step": tensors[f"{name}|t"].reshape(()).to(p.device),
                "exp_avg": tensors[f"{name}|m"].to(p.device),
                "exp_avg_sq": tensors[f"{name}|v"].to(p.device),
            }
    torch.set_rng_state(tensors["rng"])
    return meta["step"], meta["tokens"], meta["train_s"], meta["base_loss"], _remark(meta.get("machine"))


def _remark(then: Mapping[str, Any] | None) -> str | None:
    """What is not as it was when the checkpoint was written, as far as bits depend on it."""
    now = bits_depend_on()
    other = [f"{k} {then[k]}, now {v}" for k, v in now.items() if then is not None and then.get(k, v) != v]
    return f"the last digits may differ from one run without a break: {'; '.join(other)}" if other else None
