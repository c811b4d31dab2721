"""Many adapters trained together on one frozen base: each row of a batch carries its adapter.

A separate run for each setting loads the model, measures the base and reads all weights at every step again. Here all
of that happens once; each adapter sees the very rows of its own run, in their order, has an optimiser of its own, and
ends where its own run would, within rounding.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_core.adapter import Adapter, attach
from lora_core.adapter import rows as per_row
from lora_core.checkpoint import find_checkpoint, restore_checkpoint, save_checkpoint
from lora_core.errors import UserError
from lora_core.evaluate import mean_loss, only, portions, spread
from lora_core.graphs import MOST, Gradients, Update
from lora_core.machine import keep_heap
from lora_core.objective import Objective, batches_of, objective_for
from lora_core.sealed import remove
from lora_core.spec import LoraSpec
from lora_core.starts import from_gradient
from lora_core.train import TrainConfig, TrainEvent, parameter_groups, tokenizer_of, update_norms

if TYPE_CHECKING:
    from lora_core.tasks import Task

TOGETHER = 4096  # tokens in a forward pass; more gains nothing, since the weights' share is small by then


@dataclass(frozen=True, kw_only=True)
class SweepEvent:
    """A TrainEvent of one of the adapters; `event.train_s` is its share of the steps that it had together."""

    name: str
    event: TrainEvent


class _Run:
    """One adapter's own: parameters, optimiser, figures."""

    def __init__(self, adapter: Adapter, config: TrainConfig) -> None:
        self.adapter = adapter
        self.params = list(adapter.parameters())
        self.update = Update(self.params, parameter_groups(adapter, config), config.lr, config.clip)
        self.tokens, self.train_s = 0, 0.0
        self.start, self.saved = 0, 0  # the steps of the checkpoints that it goes on from, and of the last one
        self.base: float | None = None
        self.held: float | None = None
        self.message: str | None = None
        self.over = False

    def step(self, loss: float, norm: float, lr: float, step: int) -> bool:
        """What follows the optimiser's step; False where the loss or the gradient was not finite."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.update.undo()
            self.message = f"diverged at step {step}, at learning rate {lr:.2g}; the adapter of step {step - 1} is kept"
            return False
        self.adapter.shrink(lr)
        return True


def sweep(model: nn.Module, specs: Mapping[str, LoraSpec], task: Task, config: TrainConfig | None = None, *,
          objective: Objective | str | None = None, tokenizer: Any = None,
          stop: Callable[[], bool] | None = None,
          leave: Callable[[str], bool] | None = None,
          checkpoints: Mapping[str, str | Path] | None = None) -> Iterator[SweepEvent]:  # fmt: skip
    """Attach an adapter for every spec, {name: spec}, and train all of them; events of each as `train` gives them.

    stop         asked after every step; True ends all of them and keeps the adapters
    leave        asked after every step with each adapter's name; True ends that one, and the others go on
    checkpoints  {name: file}, as `train` has one, and of the same form: either goes on from what the other has written.
                 Where they are of different steps, those that are further wait for the others

    The adapters stay attached and are off afterwards. Raises UserError as `attach` and `train` do, for a spec with
    dropout (whose draws would be others than in a run of its own), and for an objective that has no `losses`.
    """
    config = config or TrainConfig()
    if not specs:
        raise UserError("no settings to sweep over: give at least one spec")
    for name, spec in specs.items():
        if spec.dropout:
            raise UserError(f"{name} has dropout, which rows of a shared batch cannot have; train it with `train`")
    if not task.train:
        raise UserError(f"task {task.name!r} has no rows to train on")
    adapters = [attach(model, spec, name, seed=config.seed) for name, spec in specs.items()]
    goal: Any = objective_for(objective, adapters[0], task, tokenizer or tokenizer_of(model), config)
    if not hasattr(goal, "losses"):
        raise UserError(f"objective {goal.name!r} cannot train several adapters in one batch; train them one by one")
    for a in adapters:
        goal.check(a)
    files = {name: Path(file) for name, file in (checkpoints or {}).items() if name in specs}
    yield from _train(model, [_Run(a, config) for a in adapters], goal, task, config, stop,
                      leave or (lambda name: False), files)  # fmt: skip


def _train(model: nn.Module, runs: list[_Run], goal: Any, task: Task, config: TrainConfig,
           stop: Callable[[], bool] | None, leave: Callable[[str], bool], files: Mapping[str, Path]
           ) -> Iterator[SweepEvent]:  # fmt: skip
    items = goal.encode(task.train)
    held = goal.encode(spread(task.test, config.eval_rows))
    order = batches_of(goal, items, config.batch_size, config.seed)
    began, was = time.perf_counter(), model.training
    remarks = {run: restored(run, files.get(run.adapter.name), config, goal) for run in runs}
    start = min(run.start for run in runs)
    for _ in range(start * config.accumulate):
        next(order)
    reason, step, gradients = "done", start, Gradients(goal, [p for r in runs for p in r.params])

    def event(run: _Run, kind: Any, **more: Any) -> SweepEvent:
        spent = time.perf_counter() - began
        left = spent * (config.steps - step) / (step - start) if step > start else None
        return SweepEvent(name=run.adapter.name, event=TrainEvent(
            kind=kind, step=max(step, run.start), steps=config.steps, tokens=run.tokens, tokens_per_s=None,
            train_s=run.train_s, seconds=time.perf_counter() - began, left_s=left, **more))  # fmt: skip

    @torch.no_grad()
    def measure(live: list[_Run]) -> None:
        if not live or not held:
            return
        if not live[0].update.gpu:  # apart, as in runs of their own: it takes as long, and has the same last digits
            for run in live:
                with only(model, run.adapter.name):
                    run.held = mean_loss(goal, held)
            return
        sums, labelled = dict.fromkeys(live, 0.0), 0
        for rows in portions(goal, held):
            for group in _groups(live, [rows]):
                batch = goal.batch(list(rows) * len(group))
                with per_row(model, [r.adapter.name for r in group]):
                    for run, loss in zip(group, goal.losses(batch, len(group)), strict=True):
                        sums[run] += float(loss)
            labelled += batch.labelled // len(group)
        for run in live:
            run.held = sums[run] / max(1, labelled)

    def save(run: _Run) -> None:
        if (file := files.get(run.adapter.name)) and run.saved != step:
            save_checkpoint(file, run.adapter, run.update.optimizer, config, goal.name, step, run.tokens, run.train_s,
                            run.base)  # fmt: skip
            run.saved = step

    with ExitStack() as after:
        after.enter_context(keep_heap())
        after.callback(model.train, was)
        after.callback(gradients.close)
        for run in runs:
            after.callback(run.adapter.enable, False)
            after.callback(run.update.close)
        base = next((run.base for run in runs if run.base is not None), None)
        if base is None:
            with only(model, None):
                base = mean_loss(goal, held)
        for run in runs:
            run.base = base if run.base is None else run.base
            if run.adapter.spec.init == "gradient" and not run.start:
                with only(model, run.adapter.name):
                    from_gradient(run.adapter, goal, items[: 4 * config.batch_size], config.seed)
            yield event(run, "base", loss=run.base, held_loss=run.base, message=remarks[run])
        for step in range(start + 1, config.steps + 1):
            picked = [[items[i] for i in indices] for indices in itertools.islice(order, config.accumulate)]
            lr = config.rate(step)
            for group in _groups([r for r in runs if not r.over and r.start < step], picked):
                at = time.perf_counter()
                losses, labelled = _backward(model, group, goal, picked, gradients)
                norms = torch.stack([run.update(lr) for run in group])
                sums, norms = torch.stack([losses, norms.to(losses)]).tolist()  # a GPU is waited for once
                took = (time.perf_counter() - at) / len(group)
                for run, total, norm in zip(group, sums, norms, strict=True):
                    loss = total / labelled
                    run.tokens += sum(len(e) for rows in picked for e in rows)
                    run.train_s += took
                    if not run.step(loss, norm, lr, step):
                        run.over = True
                        yield event(run, "end", loss=run.held, held_loss=run.held, reason="diverged",
                                    message=run.message, norms=update_norms(run.adapter))  # fmt: skip
                        continue
                    yield event(run, "step", loss=loss, lr=lr, grad_norm=norm)
            live = [r for r in runs if not r.over and r.start < step]
            if held and step in config.eval_steps:
                measure(live)
                for run in live:
                    yield event(run, "held", held_loss=run.held)
            if config.checkpoint_every and step % config.checkpoint_every == 0 and step < config.steps:
                for run in live:
                    save(run)
            for run in [r for r in live if step < config.steps and leave(r.adapter.name)]:
                run.over = True
                save(run)
                measure([run])
                yield event(run, "end", loss=run.held, held_loss=run.held, reason="stopped",
                            norms=update_norms(run.adapter))  # fmt: skip
            live = [r for r in live if not r.over]
            if stop is not None and stop() and step < config.steps:
                reason = "stopped"
                for run in live:
                    save(run)
                measure([r for r in runs if not r.over])
                break
            if all(r.over for r in runs):
                break
        for run in runs:
            if not run.over:
                yield event(run, "end", loss=run.held, held_loss=run.held, reason=reason,
                            norms=update_norms(run.adapter))  # fmt: skip
                if reason == "done" and (file := files.get(run.adapter.name)):
                    remove(file)


def restored(run: _Run, file: Path | None, config: TrainConfig, goal: Any) -> str | None:
    """Bring a run to where its checkpoint is, if there is one; gives a remark as `restore_checkpoint` does."""
    found = find_checkpoint(file) if file else None
    if found is None:
        return None
    run.start, run.tokens, run.train_s, run.base, remark = restore_checkpoint(
        found, run.adapter, run.update.optimizer, config, goal.name)  # fmt: skip
    run.saved = run.start
    run.update.start_here()
    return remark


def _groups(runs: list[_Run], picked: Sequence[Sequence[Any]]) -> Iterator[list[_Run]]:
    """Adapters whose rows go through the model together."""
    tokens = max(max(len(e) for e in rows) * len(rows) for rows in picked)
    most = MOST if runs and runs[0].update.gpu else TOGETHER
    size = max(1, min(len(runs), most // max(1, tokens)))
    yield from (runs[i : i + size] for i in range(0, len(runs), size))


def _backward(model: nn.Module, group: list[_Run], goal: Any, picked: list[list[Any]], gradients: Gradients
              ) -> tuple[torch.Tensor, float]:  # fmt: skip
    """Gradients of every adapter's own mean loss; its sum for each of them, and over how many labels it is."""
    model.train()
    params = [p for r in group for p in r.params]
    batches = [goal.batch(rows * len(group)) for rows in picked]
    labelled = sum(b.labelled for b in batches) / len(group)
    with per_row(model, [r.adapter.name for r in group]):
        losses = [gradients(batch, params, labelled, len(group)) for batch in batches]
    return torch.stack(losses).double().sum(0), labelled
