"""What a training changed, measured at its end: the numbers that an `Effect` is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_core.classification import Classification, TextBatch
from lora_core.effect import Effect
from lora_core.errors import UserError
from lora_core.evaluate import ROWS, spread
from lora_core.objective import IGNORED, Batch, CausalLM, Objective, objective_for
from lora_core.preference import Pair, Preference

if TYPE_CHECKING:
    from lora_core.adapter import Adapter
    from lora_core.tasks import Task
    from lora_core.train import TrainConfig

MEASURED = 32  # held-out rows whose most probable words are compared
KNOWN = (CausalLM, Classification, Preference)
ENDS = 5  # steps at each end of a run whose mean training losses are compared


def measure_effect(adapter: Adapter, task: Task, config: TrainConfig, events: Sequence[Any], *,
                   objective: Objective | str | None = None, tokenizer: Any = None, rows: int = MEASURED,
                   stop: Callable[[], bool] | None = None) -> Effect:  # fmt: skip
    """What a training did to an adapter's model, measured at its end; takes two passes over `rows` held-out rows.

    events  of the training: `TrainEvent`s, or the dictionaries that these give
    stop    asked between batches; True leaves `changed` out

    The adapter acts or not afterwards as it did before.
    """
    if not isinstance(objective, KNOWN):
        from lora_core.train import tokenizer_of

        objective = objective_for(objective, adapter, task, tokenizer or tokenizer_of(adapter.model), config)
    if not isinstance(objective, KNOWN):
        raise UserError(f"objective {objective.name!r} has no most probable word or label that could change")
    told = [e if isinstance(e, Mapping) else e.to_dict() for e in events]
    steps = [e for e in told if e.get("kind") == "step"]
    held = [e["held_loss"] for e in told if e.get("kind") in ("held", "end") and e.get("held_loss") is not None]
    losses = [e["loss"] for e in steps if e.get("loss") is not None]
    delta, W0 = sizes(adapter)
    changed = changed_share(adapter, objective, spread(task.test, rows), stop)
    factors = [adapter.factors(k) for k in adapter.sites]
    zero = bool(factors) and not adapter.copies and not adapter.added and all(
        not bool(f.A.any()) and not bool(f.B.any()) for f in factors)  # fmt: skip
    return Effect(
        delta=delta, W0=W0, hit=len(factors) + len(adapter.copies) + len(adapter.added), both_zero=zero,
        gradient=max((e["grad_norm"] for e in steps if e.get("grad_norm") is not None), default=None),
        steps=max((e["step"] for e in steps), default=0), rates=sum(e.get("lr") or 0.0 for e in steps), lr=config.lr,
        scaling=max((abs(f.scaling) for f in factors), default=1.0),
        rank=max((f.A.shape[0] for f in factors), default=0),
        changed=changed[0], counted=changed[1], thing="text" if isinstance(objective, Classification) else "token",
        loss_before=next((e.get("held_loss") for e in told if e.get("kind") == "base"), None),
        loss_after=held[-1] if held else None,
        train_before=mean(losses[:ENDS]), train_after=mean(losses[-ENDS:]),
        diverged=any(e.get("reason") == "diverged" for e in told),
    )  # fmt: skip


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


@torch.no_grad()
def sizes(adapter: Adapter) -> tuple[float, float]:
    """(‖ΔW‖_F, ‖W0‖_F) over everything that has a frozen counterpart: matrices, and what is trained itself."""
    from lora_core.train import update_norms

    delta = sum(v * v for v in update_norms(adapter).values())
    W0 = sum(float(adapter.W0(k).float().norm()) ** 2 for k in adapter.sites)
    for name, copy in adapter.copies.items():
        path, _, param = name.rpartition(".")
        own = adapter.model.get_submodule(path)._parameters[param]
        assert own is not None
        delta += float((copy.float() - own.float()).norm()) ** 2
        W0 += float(own.float().norm()) ** 2
    return math.sqrt(delta), math.sqrt(W0)


@torch.no_grad()
def changed_share(adapter: Adapter, objective: CausalLM | Classification | Preference, rows: Sequence[Any],
                  stop: Callable[[], bool] | None = None) -> tuple[float | None, int]:  # fmt: skip
    """(share of the labelled tokens or texts of `rows` whose most probable choice the adapter changed, how many).

    Of a preference those of the better answers. (None, 0) without rows, or where `stop` ended it.
    """
    items = sorted(objective.encode(rows), key=len)
    model, was, on = adapter.model, adapter.model.training, adapter.on
    same = total = 0
    model.eval()
    try:
        for i in range(0, len(items), ROWS):
            if stop is not None and stop():
                return None, 0
            with adapter.disabled():
                base = choices(objective, items[i : i + ROWS])
            adapter.enable()
            now = choices(objective, items[i : i + ROWS])
            same += int((base == now).sum())
            total += len(base)
    finally:
        model.train(was)
        if not adapter.merged:
            adapter.enable(on)
    return ((total - same) / total, total) if total else (None, 0)


def choices(objective: CausalLM | Classification | Preference, items: Sequence[Any]) -> Tensor:
    """The most probable token at every labelled place of encoded rows, or the most probable label of each text."""
    if isinstance(objective, Classification):
        texts: TextBatch = objective.batch(items)
        return objective.logits(texts.ids, texts.mask).argmax(-1)
    lm = objective.lm if isinstance(objective, Preference) else objective
    batch: Batch = lm.batch([e.chosen if isinstance(e, Pair) else e for e in items])
    at = (batch.labels[:, 1:].reshape(-1) != IGNORED).nonzero().squeeze(1)
    return lm.logits(batch.ids, at).argmax(-1)
