"""Whether a training fits into the memory that is free, told before anything is loaded."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from lora_core.errors import UserError

if TYPE_CHECKING:
    from lora_core.spec import LoraSpec
    from lora_core.tasks import Task
    from lora_core.train import TrainConfig

CGROUP = Path("/sys/fs/cgroup")
CHARACTERS = 4  # of a token, where no tokenizer is loaded yet: rather too few tokens than too many
LOOKED_AT = 256  # rows


def free_memory() -> int:
    """Bytes that a new process can have: what the system has available and what it can swap, or a container's share."""
    free = psutil.virtual_memory().available
    with suppress(OSError, RuntimeError):
        free += psutil.swap_memory().free
    with suppress(OSError, ValueError):
        most = int((CGROUP / "memory.max").read_text())  # "max" where there is no limit
        used = int((CGROUP / "memory.current").read_text())
        told = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, most - used + int(told.get("inactive_file", 0)))
    return max(0, free)


def step_tokens(task: Task, config: TrainConfig) -> int:
    """Tokens of a forward pass, from the characters of the rows: those of a row on average, times the rows."""
    from lora_core.evaluate import spread

    lengths = [(len(r.prompt) + len(r.completion)) // CHARACTERS + 1 for r in spread(task.train, LOOKED_AT)]
    cut = [min(n, config.max_tokens) for n in lengths] or [1]
    return max(1, round(config.batch_size * sum(cut) / len(cut)))


def check_memory(shapes: Any, spec: LoraSpec, config: TrainConfig, tokens: int) -> None:
    """UserError when a training on this machine's processors needs more memory than is free.

    shapes: the model, or its shapes; tokens: of a forward pass
    """
    if fault := fault_of(shapes, spec, config, tokens):
        raise UserError(fault)


def fault_of(shapes: Any, spec: LoraSpec, config: TrainConfig, tokens: int) -> str | None:
    """The sentence that says so, or None where it fits. UserError for a spec that the model cannot have."""
    from lora_core.budget import budget
    from lora_core.machine import pick_device

    if pick_device(config.device) != "cpu":
        return None  # a GPU's memory says so itself, and the server lives
    cost = budget(shapes, spec, tokens=tokens)
    need, free = cost.train_bytes, free_memory()
    if need <= free:
        return None
    less = "a smaller batch or shorter rows"
    advice = less if cost.memory.activations > cost.memory.weights else "a smaller model"
    return (f"memory: this training needs about {size(need)}, and {size(free)} are free; take {advice}, or close "
            "something (`lora-lab train --anyway` tries it)")  # fmt: skip


def check_request(model: str, spec: LoraSpec, config: TrainConfig, task: Task, labels: int | None = None) -> None:
    """`check_memory` of a training whose model is not loaded; what else is wrong with it is for others to say."""
    from lora_core.models import empty_model

    fault = None
    with suppress(UserError):
        shapes = empty_model(model, dtype=config.dtype, labels=labels)
        fault = fault_of(shapes, spec, config, step_tokens(task, config))
    if fault:
        raise UserError(fault)


def size(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"
