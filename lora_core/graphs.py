"""A training step as one CUDA graph.

A step of a small model is some thousands of small kernels. A GPU is done with each before Python has asked for the
next, so that most of a step is waiting. A CUDA graph is such a step recorded once, for batches of one shape, and
replayed by one call. So that few shapes occur, batches are filled up here: with places behind the rows, which causal
attention never reaches, and with labels that count nothing.

The first batch of a shape is computed as usual, which also loads what the recording needs; the second is recorded.
What is recorded holds as long as nobody changes what acts on the model; every step looks, and hooks, other methods
than factors, other objectives and models that fast.py does not know are computed as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_core import fast
from lora_core.objective import IGNORED, Batch, CausalLM
from lora_core.registry import book_of

KEPT = 24  # recordings at a time
MOST = 1 << 14  # tokens in a forward pass; more keep a GPU busy without a recording
EDGE = 16  # rows are filled up to a multiple of it, or to an eighth of the power of two above them
State = tuple[Any, ...]


class Gradients:
    """Adds a batch's gradients to p.grad, by a recording where there can be one."""

    def __init__(self, objective: Any) -> None:
        self.objective = objective
        self.steps: dict[State, _Step] = {}
        self.grads: dict[nn.Parameter, Tensor] = {}
        self.pool: Any = None
        self.on = type(objective) is CausalLM and objective.device.type == "cuda" and bool(objective.fast)

    def __call__(self, batch: Any, params: Sequence[nn.Parameter], labelled: float, parts: int = 1) -> Tensor:
        """∂(Σ losses/labelled)/∂p is added to p.grad; the losses (parts,) of so many equal parts of the rows, nats."""
        if self.on and (state := state_of(self.objective.model)) is not None and batch.ids.numel() <= MOST:
            flat, shape = padded(batch, parts)
            key = (shape, state, tuple(map(id, params)))
            step = self.steps.get(key)
            if step is None and len(self.steps) < KEPT:
                step = self.steps[key] = _Step(self.objective, shape, params, [self._grad(p) for p in params])
            if step is not None:
                self._stand_in(params)
                try:
                    return step(flat, labelled, self)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError:  # what this torch cannot record
                    if step.used < 2:
                        raise
                    self.on = False
                    self.steps.clear()
        goal = self.objective
        losses = goal.losses(batch, parts) if parts > 1 else [goal.loss(batch)]
        (torch.stack(losses).sum() / labelled).backward()
        return torch.stack([loss.detach() for loss in losses])

    def _grad(self, p: nn.Parameter) -> Tensor:
        if p not in self.grads:
            self.grads[p] = torch.zeros_like(p)
        return self.grads[p]

    def _stand_in(self, params: Sequence[nn.Parameter]) -> None:
        """p.grad of all is what recordings add to."""
        fresh = []
        for p in params:
            mine = self._grad(p)
            if p.grad is None:
                fresh.append(mine)
            elif p.grad is not mine:
                mine.copy_(p.grad)
            p.grad = mine
        if fresh:
            torch._foreach_zero_(fresh)


class _Step:
    """Batches of one shape: computed, then recorded, then replayed."""

    def __init__(self, objective: CausalLM, shape: tuple[int, ...], params: Sequence[nn.Parameter],
                 grads: Sequence[Tensor]) -> None:  # fmt: skip
        self.used, self.graph = 0, None
        self.rows, self.time, self.each, self.parts = shape
        device, n = objective.device, self.rows * self.time + 2 * self.each * self.parts
        self.flat = torch.empty(n, dtype=torch.long, device=device)
        self.share = torch.empty((), dtype=torch.float64, device=device)
        self.losses = torch.empty(self.parts, dtype=torch.float64, device=device)
        self.objective, self.params, self.grads = objective, list(params), list(grads)

    def __call__(self, flat: Tensor, labelled: float, owner: Gradients) -> Tensor:
        self.flat.copy_(flat)
        self.share.fill_(1 / labelled)
        self.used += 1
        if self.used == 1:
            self._run()
        else:
            if self.graph is None:
                self.graph = _record(self._run, owner)
            self.graph.replay()
        return self.losses.clone()

    def _run(self) -> None:
        ids, at, targets = self.flat.split([self.rows * self.time] + 2 * [self.each * self.parts])
        losses = losses_at(self.objective, ids.view(self.rows, -1), at, targets, self.parts)
        found = torch.autograd.grad(losses.sum() * self.share, self.params, materialize_grads=True)
        torch._foreach_add_(self.grads, list(found))
        self.losses.copy_(losses.detach())


def _record(run: Callable[[], None], owner: Gradients) -> Any:
    """Of all of them one at a time is replayed and nothing in their memory outlives it, so that they share it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    owner.pool = owner.pool or torch.cuda.graph_pool_handle()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graph.capture_begin(pool=owner.pool, capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)
    return graph


def losses_at(objective: CausalLM, ids: Tensor, at: Tensor, targets: Tensor, parts: int) -> Tensor:
    """The losses (parts,) of ids (rows, time) at the places `at`, all different, of rows·time, as many in every part;
    a target of −100 counts nothing."""
    head, h = cast(Any, objective.model).get_output_embeddings(), cast(fast.Body, objective.fast)(ids, at, True)
    pairs = zip(h.chunk(parts), targets.chunk(parts), strict=True)
    return torch.stack([fast.loss_of(head, x, t, some=True) for x, t in pairs])  # pyright: ignore


def padded(batch: Batch, parts: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """(ids, places and targets in one row of numbers; (rows, time, places of a part, parts)): a batch filled up.

    The last token of every row is only a target. Places that are added are others than those that are there.
    """
    ids, targets = batch.ids[:, :-1].cpu(), batch.labels[:, 1:].cpu()
    rows, time = ids.shape
    full = rounded(time)
    wide = torch.zeros(rows, full, dtype=torch.long)
    wide[:, :time] = ids
    labels = torch.full_like(wide, IGNORED)
    labels[:, :time] = targets
    of_part = labels.view(parts, -1)
    counts, room = (of_part != IGNORED).sum(1), of_part.shape[1]
    quarter = -(-room // 4)
    each = min(room, max(1, -(-int(counts.max()) // quarter)) * quarter)
    # Places with a label first, in their order, then others: a stable sort.
    places = (of_part == IGNORED).to(torch.int8).sort(dim=1, stable=True).indices[:, :each]
    at = places + room * torch.arange(parts)[:, None]
    return torch.cat([wide.view(-1), at.reshape(-1), labels.view(-1)[at.reshape(-1)]]), (rows, full, each, parts)


def rounded(n: int) -> int:
    """The least multiple of 16, or for long rows of an eighth of the power of two above n, that is not below n."""
    step = max(EDGE, 1 << max(0, n.bit_length() - 3))
    return -(-n // step) * step


def state_of(model: nn.Module) -> State | None:
    """What a recording depends on besides its inputs; None where there should be none."""
    if not fast.plain(model):
        return None
    out: list[Any] = [model.training]
    for a in book_of(model).adapters.values():
        if not a.on or a.merged:
            continue
        if a.copies or a.added:
            return None
        rows = a._switch.rows
        if isinstance(rows, Tensor):
            return None
        out += [id(a), a._switch.batch, None if rows is None else (rows.start, rows.stop)]
        for f in a._factors.values():
            out += [f.scaling, f.A.data_ptr(), f.B.data_ptr()]
    return tuple(out)
