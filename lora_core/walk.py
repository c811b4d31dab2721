"""One training step at a time, and each in its stages: forward, gradient, Adam, the new ΔW, with the numbers of each.

A `Walk` makes the very steps that `train` makes (same rows, same optimiser, same schedule), but stops between them and
says what happened. Its adapter is on the model only while a stage is computed, and the model's other adapters are off
for that while: between two stages the model is as it was.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_core.adapter import attach
from lora_core.errors import UserError
from lora_core.evaluate import only, pieces
from lora_core.graphs import adamw
from lora_core.objective import IGNORED, CausalLM, batches_of, wide
from lora_core.spectra import spectra
from lora_core.starts import from_gradient
from lora_core.train import parameter_groups, update_norms

if TYPE_CHECKING:
    from lora_core.adapter import Adapter
    from lora_core.spec import LoraSpec
    from lora_core.tasks import Task
    from lora_core.train import TrainConfig

NAME = "walk"


@dataclass(frozen=True, kw_only=True)
class Forward:
    """The rows of a step, read by the model as it is before it.

    step      number of the step, from 1
    loss      mean over the labelled tokens, nats: what `train` says of this step
    labelled  how many these are; tokens: all real ones; rows: in the step
    texts     for each row its tokens: (text, loss in nats), None where nothing is learnt
    """

    step: int
    loss: float
    labelled: int
    tokens: int
    rows: int
    texts: tuple[tuple[tuple[str, float | None], ...], ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What a step did to one matrix.

    grad_A, grad_B   ‖∂L/∂A‖_F and ‖∂L/∂B‖_F, before clipping
    step_A, step_B   ‖change of A‖_F and ‖change of B‖_F that Adam made
    entry_A, entry_B the mean size of an entry's change
    before, after    singular values of ΔW, largest first; norm_before, norm_after: ‖ΔW‖_F
    """

    grad_A: float
    grad_B: float
    step_A: float
    step_B: float
    entry_A: float
    entry_B: float
    before: tuple[float, ...]
    after: tuple[float, ...]
    norm_before: float
    norm_after: float


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """A whole step.

    lr         its learning rate
    grad_norm  of all factors together; clipped: what the gradients were multiplied by (1 where nothing was clipped)
    matrices   {key: Moved}
    loss, loss_after  of the step's rows before and after it, nats a token
    """

    step: int
    lr: float
    grad_norm: float
    clipped: float
    matrices: dict[str, Moved]
    loss: float
    loss_after: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Walk:
    """Steps of a fresh adapter of `spec` on a model; the base model stays as it is, and so do its other adapters.

    Completions are what is learnt ("lm"). Raises UserError as `attach` and `train` do. Equal to `train` to the bit
    where nothing is drawn in a step, that is without dropout.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, task: Task, spec: LoraSpec, config: TrainConfig) -> None:
        if not task.train:
            raise UserError(f"task {task.name!r} has no rows to train on")
        self.model, self.spec, self.config, self.tokenizer = model, spec, config, tokenizer
        self.objective = CausalLM(model, tokenizer, task.template, config.max_tokens)
        self.items = self.objective.encode(task.train)
        order = batches_of(self.objective, self.items, config.batch_size, config.seed)
        self._batches = (list(itertools.islice(order, config.accumulate)) for _ in range(config.steps))
        self._rows: list[list[int]] = []
        self.step = 0
        self._factors: dict[str, Tensor] | None = None
        self._adam: dict[str, Any] | None = None

    @contextmanager
    def _on_model(self) -> Iterator[Adapter]:
        """The walk's adapter on the model with the factors as they stand, acting alone."""
        adapter = attach(self.model, self.spec, NAME, seed=self.config.seed)
        was = self.model.training
        try:
            with only(self.model, NAME):
                self.objective.check(adapter)
                if self._factors is not None:
                    with torch.no_grad():
                        for name, p in adapter.named_parameters():
                            p.copy_(self._factors[name])
                elif self.spec.init == "gradient":
                    from_gradient(adapter, self.objective, self.items[: 4 * self.config.batch_size], self.config.seed)
                self._factors = {n: p.detach().clone() for n, p in adapter.named_parameters()}
                yield adapter
        finally:
            self.model.train(was)
            adapter.detach()

    def _next(self) -> list[list[int]]:
        if not self._rows:
            if self.step >= self.config.steps:
                raise UserError(f"the last of {self.config.steps} steps was walked; begin anew")
            self._rows = next(self._batches)
        return self._rows

    @torch.no_grad()
    def forward(self) -> Forward:
        """The next step's rows with the loss of every token; changes nothing."""
        rows = self._next()
        texts: list[tuple[tuple[str, float | None], ...]] = []
        total, labelled, tokens = 0.0, 0, 0
        with self._on_model():
            self.model.eval()
            for indices in rows:
                batch = self.objective.batch([self.items[i] for i in indices])
                targets = batch.labels[:, 1:]
                trained = targets != IGNORED
                logits = self.objective.logits(batch.ids, trained.reshape(-1).nonzero().squeeze(1))
                each = -wide(logits).log_softmax(-1).gather(1, targets[trained][:, None]).squeeze(1)
                total, labelled, tokens = total + float(each.sum()), labelled + len(each), tokens + batch.tokens
                losses = torch.zeros(targets.shape, dtype=each.dtype, device=each.device)
                losses[trained] = each
                for i, row in zip(indices, losses.tolist(), strict=True):
                    e = self.items[i]
                    shown = pieces(self.tokenizer, e.ids)
                    texts.append(tuple((t, row[j - 1] if j >= e.start else None) for j, t in enumerate(shown)))
        return Forward(step=self.step + 1, loss=total / max(1, labelled), labelled=labelled, tokens=tokens,
                       rows=sum(map(len, rows)), texts=tuple(texts))  # fmt: skip

    def finish(self) -> Stepped:
        """Gradient, Adam and the new ΔW: the step is made. UserError where a number stops being finite."""
        config, rows, number = self.config, self._next(), self.step + 1
        with self._on_model() as adapter, torch.random.fork_rng():
            torch.manual_seed(config.seed + self.step)  # dropout
            params = list(adapter.parameters())
            optimizer = adamw(parameter_groups(adapter, config), config.lr)
            if self._adam is not None:
                optimizer.load_state_dict(self._adam)
            lr = config.rate(number)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["ratio"]
            before, norms = spectra(adapter), update_norms(adapter)
            self.model.train()
            batches = [self.objective.batch([self.items[i] for i in indices]) for indices in rows]
            labelled = sum(b.labelled for b in batches)
            total = 0.0
            for b in batches:
                loss = self.objective.loss(b)
                total += float(loss.detach())
                (loss / labelled).backward()
            grads = {n: norm(p.grad) for n, p in adapter.named_parameters()}
            whole = float(torch.nn.utils.clip_grad_norm_(params, config.clip or math.inf))
            if not (math.isfinite(total) and math.isfinite(whole)):
                raise UserError(f"step {number} is no finite number at learning rate {lr:.2g}: try a tenth of it")
            old = {n: p.detach().clone() for n, p in adapter.named_parameters()}
            optimizer.step()
            adapter.shrink(lr)
            self.model.eval()
            with torch.no_grad():
                now = sum(float(self.objective.loss(b)) for b in batches)
                change = {n: (p - old[n]) for n, p in adapter.named_parameters()}
            after, new_norms = spectra(adapter), update_norms(adapter)
            self._factors = {n: p.detach().clone() for n, p in adapter.named_parameters()}
            self._adam = optimizer.state_dict()
        self.step, self._rows = number, []
        matrices = {}
        for k in before:
            A, B = f"{k}.A", f"{k}.B"
            matrices[k] = Moved(
                grad_A=grads[A], grad_B=grads[B], step_A=norm(change[A]), step_B=norm(change[B]),
                entry_A=float(change[A].abs().mean()), entry_B=float(change[B].abs().mean()),
                before=before[k].singular_values, after=after[k].singular_values,
                norm_before=norms[k], norm_after=new_norms[k])  # fmt: skip
        return Stepped(step=number, lr=lr, grad_norm=whole, matrices=matrices, loss=total / max(1, labelled),
                       clipped=min(1.0, config.clip / whole) if config.clip and whole else 1.0,
                       loss_after=now / max(1, labelled))  # fmt: skip


def norm(x: Tensor | None) -> float:
    """‖x‖_F; 0 for a gradient that is not there."""
    return 0.0 if x is None else float(x.norm())
