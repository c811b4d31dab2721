"""The training loop: a stream of events, one per optimiser step, that a page, a progress bar or a notebook can draw."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lora_core.checkpoint import find_checkpoint, restore_checkpoint, save_checkpoint
from lora_core.errors import UserError, is_real, unknown
from lora_core.evaluate import mean_loss, spread
from lora_core.graphs import Gradients, Update
from lora_core.machine import DTYPES, keep_heap
from lora_core.objective import Objective, batches_of, objective_for
from lora_core.preference import BETA
from lora_core.sealed import remove
from lora_core.starts import from_gradient

if TYPE_CHECKING:
    from lora_core.adapter import Adapter
    from lora_core.tasks import Task

SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How an adapter is trained.

    steps         optimiser steps
    batch_size    rows in a forward pass; accumulate: forward passes in a step
    lr            peak learning rate of AdamW; B's is lr_ratio times that (LoRA+, arXiv 2402.12354)
    schedule      "linear" or "cosine" down to 0 after the warm-up, or "constant"
    warmup        share of the steps in which the rate rises from 0
    weight_decay  of AdamW, on matrices: A and B, a head's weight; not on vectors
    clip          largest norm of the gradient of all factors together; 0 for no clipping
    seed          draws A, the order of the rows and dropout
    eval_rows     held-out rows that are measured on, 0 for none; eval_every: steps between, 0 for three times in a run
    max_tokens    longest row; longer ones are cut
    norms_every   steps between events that carry ‖ΔW‖ of every matrix; 0 for none but the last
    checkpoint_every  steps between checkpoints, if train() is given a file for them
    beta          of the preference objective: how dear it is to move away from the model without the adapter
    dtype, device what the model is loaded in by the command line and the page; train() takes the model as it is
    """

    steps: int = 60
    batch_size: int = 8
    lr: float = 1e-3
    lr_ratio: float = 1.0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    seed: int = 0
    eval_rows: int = 64
    eval_every: int = 0
    max_tokens: int = 256
    norms_every: int = 2
    checkpoint_every: int = 10
    beta: float = BETA
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        def whole(name: str, low: int, high: int) -> None:
            v = getattr(self, name)
            if isinstance(v, bool) or not isinstance(v, int) or not low <= v <= high:
                raise UserError(f"{name} is {v!r}; it must be a whole number from {low} to {high:,}")

        def real(name: str, low: float, high: float) -> None:
            v = getattr(self, name)
            if not is_real(v, low, high):
                raise UserError(f"{name} is {v!r}; it must be a number from {low:g} to {high:g}")
            object.__setattr__(self, name, float(v))

        for name, low, high in (("steps", 1, 10**6), ("batch_size", 1, 4096), ("accumulate", 1, 4096),
                                ("seed", 0, 2**31 - 1), ("eval_rows", 0, 10**6), ("eval_every", 0, 10**6),
                                ("max_tokens", 2, 10**6), ("norms_every", 0, 10**6),
                                ("checkpoint_every", 0, 10**6)):  # fmt: skip
            whole(name, low, high)
        for name, low, high in (
            ("lr", 0, 1e6),
            ("lr_ratio", 0, 1e6),
            ("warmup", 0, 1),
            ("weight_decay", 0, 1e3),
            ("clip", 0, 1e9),
            ("beta", 0, 1e3),
        ):
            real(name, low, high)
        if self.lr == 0:
            raise UserError("lr is 0: nothing would be learnt; try 1e-3")
        if self.beta == 0:
            raise UserError(f"beta is 0: no answer would be preferred to another; try {BETA:g}")
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", str(self.schedule), SCHEDULES)
        for name, possible in (("dtype", ("auto", *DTYPES)), ("device", ("auto", "cpu", "cuda", "mps"))):
            v = getattr(self, name)  # which of them are here is known where the model is loaded
            if not isinstance(v, str) or len(v) > 40:
                raise UserError(f"{name} is {repr(v)[:40]}; possible: {', '.join(possible)}")

    def rate(self, step: int) -> float:
        """The learning rate of step 1, 2, …, steps."""
        warm = math.ceil(self.warmup * self.steps)
        if step <= warm:
            return self.lr * step / warm
        left = (self.steps - step + 1) / (self.steps - warm)  # 1 at the first step after the warm-up
        return (
            self.lr * {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[self.schedule]
        )

    @property
    def eval_steps(self) -> frozenset[int]:
        """The steps after which the held-out loss is measured; always the last one."""
        every = self.eval_every or max(1, round(self.steps / 3))
        return frozenset([s for s in range(every, self.steps, every) if self.steps - s > every / 2] + [self.steps])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> TrainConfig:
        """Inverse of `to_dict`; a key that is no field is a UserError."""
        if not isinstance(d, Mapping):
            raise UserError(f"the training's settings are {d!r}; they are names with values, as in {{'steps': 60}}")
        known = [f.name for f in fields(cls)]
        for key in d:
            if key not in known:
                raise unknown("setting", str(key), known, "in TrainConfig")
        return cls(**d)


@dataclass(frozen=True, kw_only=True)
class TrainEvent:
    """One thing that happened.

    kind          "base": the base model was scored before step 1; "step": an optimiser step; "held": the held-out
                  loss was measured after `step`; "end": the run is over, `reason` says how
    loss          mean loss of what the step's rows label (tokens, texts or pairs) before its update, nats; on "base"
                  and "end" the held-out loss
    held_loss     the same mean over the held-out rows, nats
    tokens        real tokens trained on so far; tokens_per_s over the last steps
    seconds       since the run began; train_s without the time of measuring; left_s: estimate of what remains
    norms         {key: ‖ΔW‖_F}
    """

    kind: Literal["base", "step", "held", "end"]
    step: int
    steps: int
    loss: float | None = None
    lr: float | None = None
    held_loss: float | None = None
    grad_norm: float | None = None
    tokens: int = 0
    tokens_per_s: float | None = None
    seconds: float = 0.0
    train_s: float = 0.0
    left_s: float | None = None
    norms: dict[str, float] | None = None
    reason: Literal["done", "stopped", "diverged"] | None = None
    message: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without those that are None."""
        return {k: v for k, v in asdict(self).items() if v is not None}


def train(
    adapter: Adapter,
    task: Task | str,
    config: TrainConfig | None = None,
    *,
    objective: Objective | str | None = None,
    tokenizer: Any = None,
    stop: Callable[[], bool] | None = None,
    checkpoint: str | Path | None = None,
) -> Iterator[TrainEvent]:
    """Train an attached adapter on a task; an event after every step. The base model stays as it is.

    task        a Task, or the name of a built-in one
    objective   "lm" (the completion's tokens), "classify" (the completion is a label), "preference" (the completion is
                better than the rejected answer), or an object with the methods of `Objective`; None takes what fits
                the model and the rows
    tokenizer   the model's; None for the one that `load_model` left with the model
    stop        asked after every step; True ends the run and keeps the adapter
    checkpoint  a file: written every config.checkpoint_every steps, and continued from when it is there. The one before
                it stays beside it, for the case that the last one is damaged; both go when the run is done

    Adam's statistics and the factors are float32. A loss or gradient that is not finite ends the run with reason
    "diverged" and the factors of the last step whose loss was finite. Raises UserError for a task without rows, and
    for an objective that does not fit the model, the rows or the adapter.
    """
    from lora_core.tasks import load_task

    config = config or TrainConfig()
    task = load_task(task, seed=config.seed) if isinstance(task, str) else task
    if adapter.merged:
        raise UserError(f"adapter {adapter.name!r} is merged into the weights; unmerge() it before training")
    if not task.train:
        raise UserError(f"task {task.name!r} has no rows to train on")
    model = adapter.model
    objective = objective_for(objective, adapter, task, tokenizer or tokenizer_of(model), config)
    objective.check(adapter)
    items = objective.encode(task.train)
    held = objective.encode(spread(task.test, config.eval_rows))
    params = list(adapter.parameters())
    update = Update(params, parameter_groups(adapter, config), config.lr, config.clip)
    optimizer = update.optimizer
    torch.manual_seed(config.seed)  # dropout
    order = batches_of(objective, items, config.batch_size, config.seed)
    start, tokens, train_s, base_loss, remark = 0, 0, 0.0, None, None
    file = Path(checkpoint) if checkpoint else None
    if file and (found := find_checkpoint(file)):
        start, tokens, train_s, base_loss, remark = restore_checkpoint(
            found, adapter, optimizer, config, objective.name
        )
        update.start_here()
        for _ in range(start * config.accumulate):
            next(order)
    elif adapter.spec.init == "gradient" and all(adapter.factors(k).untouched for k in adapter.sites):
        from_gradient(adapter, objective, items[: 4 * config.batch_size], config.seed)
    began, before = time.perf_counter(), train_s
    was = model.training, adapter.on
    adapter.enable()
    gradients = Gradients(objective, params)
    recent: deque[tuple[int, float]] = deque(maxlen=8)
    step, saved, held_loss, reason, message = start, start, base_loss, "done", None

    def event(kind: Any, **more: Any) -> TrainEvent:
        spent = sum(s for _, s in recent)
        speed = sum(n for n, _ in recent) / spent if spent else None
        per_step = (train_s - before) / max(1, step - start)
        left = (
            (config.steps - step) * per_step + sum(s > step for s in config.eval_steps) * eval_s
            if step > start
            else None
        )
        return TrainEvent(kind=kind, step=step, steps=config.steps, tokens=tokens, tokens_per_s=speed, train_s=train_s,
                          seconds=time.perf_counter() - began, left_s=left, **more)  # fmt: skip

    eval_s = 0.0
    heap = ExitStack()
    heap.enter_context(keep_heap())
    try:
        if base_loss is None:
            with adapter.disabled():
                at = time.perf_counter()
                base_loss = held_loss = mean_loss(objective, held)
                eval_s = time.perf_counter() - at
        yield event("base", loss=base_loss, held_loss=base_loss, message=remark)
        for step in range(start + 1, config.steps + 1):
            at = time.perf_counter()
            model.train()
            batches = [
                objective.batch([items[i] for i in indices]) for indices in itertools.islice(order, config.accumulate)
            ]
            labelled = sum(b.labelled for b in batches)
            lr = config.rate(step)
            losses = [gradients(b, params, labelled) for b in batches]
            *losses, norm = torch.cat([*losses, update(lr)[None]]).tolist()  # a GPU is waited for once
            total = sum(losses)
            if not (math.isfinite(total) and math.isfinite(norm)):
                update.undo()
                step -= 1
                reason = "diverged"
                what = "loss" if not math.isfinite(total) else "gradient"
                message = (f"the {what} stopped being a finite number at step {step + 1}, at learning rate {lr:.2g}: "
                           f"the adapter of step {step} is kept. Try a learning rate ten times smaller.")  # fmt: skip
                break
            adapter.shrink(lr)
            tokens += sum(b.tokens for b in batches)
            spent = time.perf_counter() - at
            train_s += spent
            recent.append((sum(b.tokens for b in batches), spent))
            norms = update_norms(adapter) if config.norms_every and step % config.norms_every == 0 else None
            yield event("step", loss=total / labelled, lr=lr, grad_norm=norm, norms=norms)
            if held and step in config.eval_steps:
                at = time.perf_counter()
                held_loss = mean_loss(objective, held)
                eval_s = time.perf_counter() - at
                yield event("held", held_loss=held_loss)
                if not math.isfinite(held_loss or 0.0):
                    reason, message = (
                        "diverged",
                        f"the held-out loss is not a finite number after step {step}: the learning rate is too large",
                    )
                    break
            if file and config.checkpoint_every and step % config.checkpoint_every == 0 and step < config.steps:
                save_checkpoint(file, adapter, optimizer, config, objective.name, step, tokens, train_s, base_loss)
                saved = step
            if stop is not None and stop() and step < config.steps:
                reason, message = "stopped", f"stopped after step {step} of {config.steps}; the adapter is kept"
                break
        if file and reason == "stopped" and step != saved:  # to go on from this very step
            save_checkpoint(file, adapter, optimizer, config, objective.name, step, tokens, train_s, base_loss)
        if held and reason == "stopped" and step not in config.eval_steps:
            held_loss = mean_loss(objective, held)
            yield event("held", held_loss=held_loss)
        yield event(
            "end", loss=held_loss, held_loss=held_loss, reason=reason, message=message, norms=update_norms(adapter)
        )
        if file and reason == "done":
            remove(file)
    finally:
        heap.close()
        gradients.close()
        update.close()
        for p in params:
            p.grad = None
        model.train(was[0])
        adapter.enable(was[1])


def parameter_groups(adapter: Adapter, config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW's groups: the rate of every B is `lr_ratio` times that of all else; vectors do not decay."""
    factors = {f"{key}.B" for key in adapter.sites}
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, p in adapter.named_parameters():
        if p.requires_grad:
            decay = config.weight_decay if p.ndim > 1 else 0.0
            groups.setdefault((config.lr_ratio if name in factors else 1.0, decay), []).append(p)
    return [{"params": ps, "ratio": ratio, "weight_decay": decay} for (ratio, decay), ps in groups.items()]


def tokenizer_of(model: Any) -> Any:
    """The tokenizer that `load_model` left with a model, or the one that lies beside its files."""
    known = getattr(getattr(model, "lora_lab", None), "tokenizer", None)
    if known is not None:
        return known
    where = getattr(getattr(model, "config", None), "_name_or_path", "")
    if where and Path(where).is_dir():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(where)
    raise UserError(
        "this model came without its tokenizer: pass tokenizer=, or load the model with lora_core.load_model"
    )


@torch.no_grad()
def update_norms(adapter: Adapter) -> dict[str, float]:
    """{key: ‖ΔW‖_F} in float32 without forming ΔW: ‖s·B·A‖² = s²·Σ (BᵀB ∘ AAᵀ). Quick enough for every step.

    DoRA's ΔW is no such product, and is formed.
    """
    found: dict[str, Tensor] = {}
    alike: dict[Any, list[tuple[str, Tensor, Tensor, float]]] = {}  # of one shape, which are one product
    for key in adapter.sites:
        f = adapter.factors(key)
        if f.m is not None:
            found[key] = f.dense(f.A.dtype, adapter.W0(key)).norm()
            continue
        B, A = f.factored()
        alike.setdefault((B.shape, A.shape, A.dtype), []).append((key, B, A, abs(f.scaling)))
    for group in alike.values():
        keys, Bs, As, s = zip(*group, strict=True)
        B, A = torch.stack(Bs), torch.stack(As)
        squares = ((B.mT @ B) * (A @ A.mT)).sum((1, 2)).clamp_min(0)
        found |= zip(keys, squares.sqrt() * squares.new_tensor(s), strict=True)
    values = torch.stack([found[key] for key in adapter.sites]).tolist() if found else []
    return dict(zip(adapter.sites, values, strict=True))
