"""A training step on a GPU as two CUDA graphs: the gradients of a batch, and what the optimiser does with them.

A step of a small model is some thousands of small kernels. A GPU is done with each before Python has asked for the
next, so that most of a step is waiting. A CUDA graph is such work recorded once and replayed by one call, for tensors
that stay where they are. So that few shapes occur, batches are filled up here: with places behind the rows, which
causal attention never reaches, and with labels that count nothing.

What is recorded holds as long as nobody changes what acts on the model. Every step looks; with hooks, other methods
than factors, other objectives and models that fast.py does not know, gradients are computed as they come.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_core import fast
from lora_core.objective import IGNORED, Batch, CausalLM
from lora_core.registry import book_of

KEPT = 24  # recordings of gradients at a time
MOST = 1 << 14  # tokens in a forward pass; more keep a GPU busy without a recording
EDGE = 32  # rows are filled up to a multiple of it, or to an eighth of the power of two above them
FEW = 2048  # places up to which a GPU takes hardly longer for all of them than for half
State = tuple[Any, ...]
_torch: Any = torch  # whose functions on lists have no types


class Recorded:
    """Work whose only input and output are tensors that stay where they are. The first call computes it, which also
    loads what a recording needs, unless warm says that this has happened; later ones replay it, if it can be recorded.

    Recordings of one pool share their memory: one is replayed at a time, and nothing in there outlives it.
    """

    def __init__(self, work: Callable[[], None], pool: Any, warm: bool = False) -> None:
        self.work, self.pool, self.warm = work, pool, warm
        self.graph, self.tries = None, 2

    def __call__(self) -> None:
        if self.graph is None and self.warm and self.tries:
            self.tries -= 1
            try:
                self.graph = record(self.work, self.pool)
            except RuntimeError:  # of no memory for it, or of something that this torch cannot record
                # Random numbers stay in the state of a recording that failed until another one has ended.
                with suppress(RuntimeError):
                    record(lambda: None, torch.cuda.graph_pool_handle())
        if self.graph is not None:
            return self.graph.replay()
        self.warm = True
        return self.work()

    def close(self) -> None:
        """Give back what the recording holds."""
        self.graph, self.tries = None, 0


def record(work: Callable[[], None], pool: Any) -> Any:
    """The CUDA graph of some work, which is not done yet."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), _nothing_collected():
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)
    return graph


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """An old recording that Python frees while another one is made breaks it."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


# ---- gradients
class Gradients:
    """Adds a batch's gradients to p.grad, by a recording where there can be one."""

    def __init__(self, objective: Any, params: Sequence[nn.Parameter]) -> None:
        self.objective, self.steps = objective, dict[State, _Step]()
        # On a GPU the gradients have a place of their own, which the optimiser's recording reads too.
        self.grads = {p: torch.zeros_like(p) for p in params if p.is_cuda}
        self.on = bool(self.grads) and type(objective) is CausalLM and bool(objective.fast)
        self.pool = torch.cuda.graph_pool_handle() if self.grads else None

    def __call__(self, batch: Any, params: Sequence[nn.Parameter], labelled: float, parts: int = 1) -> Tensor:
        """∂(Σ losses/labelled)/∂p is added to p.grad; the losses (parts,) of so many equal parts of the rows, nats."""
        for p in params if self.grads else ():
            if p.grad is not self.grads[p]:
                self.grads[p].copy_(torch.zeros_like(p) if p.grad is None else p.grad)
                p.grad = self.grads[p]
        if self.on and batch.ids.numel() <= MOST and (state := state_of(self.objective.model)) is not None:
            flat, shape = padded(batch, parts)
            key = (shape, state, tuple(map(id, params)))
            if key not in self.steps and len(self.steps) < KEPT:
                self.steps[key] = _Step(self.objective, shape, {p: self.grads[p] for p in params}, self.pool,
                                        warm=any(known[1] == state for known in self.steps))  # fmt: skip
            if key in self.steps:
                return self.steps[key](flat, labelled)
        goal = self.objective
        losses = goal.losses(batch, parts) if parts > 1 else [goal.loss(batch)]
        (torch.stack(losses).sum() / labelled).backward()
        return torch.stack([loss.detach() for loss in losses])

    def close(self) -> None:
        for step in self.steps.values():
            step.work.close()
        self.steps.clear()
        self.on = False


class _Step:
    """Batches of one shape."""

    def __init__(self, objective: CausalLM, shape: tuple[int, ...], grads: Mapping[nn.Parameter, Tensor], pool: Any,
                 warm: bool) -> None:  # fmt: skip
        self.objective, self.grads = objective, grads
        self.rows, self.time, self.each, self.parts = shape
        device, n = objective.device, self.rows * self.time + 2 * self.each * self.parts
        self.flat = torch.empty(n, dtype=torch.long, device=device)
        self.share = torch.empty((), dtype=torch.float64, device=device)
        self.losses = torch.empty(self.parts, dtype=torch.float64, device=device)
        self.work = Recorded(self._run, pool, warm)

    def __call__(self, flat: Tensor, labelled: float) -> Tensor:
        self.flat.copy_(flat)
        self.share.fill_(1 / labelled)
        self.work()
        return self.losses.clone()

    def _run(self) -> None:
        ids, at, targets = self.flat.split([self.rows * self.time] + 2 * [self.each * self.parts])
        losses = losses_at(self.objective, ids.view(self.rows, -1), at, targets, self.parts)
        found = torch.autograd.grad(losses.sum() * self.share, list(self.grads), materialize_grads=True)
        _torch._foreach_add_(list(self.grads.values()), list(found))
        self.losses.copy_(losses.detach())


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
    some = -(-room // (2 if wide.numel() <= FEW else 4))
    each = min(room, max(1, -(-int(counts.max()) // some)) * some)
    # Places with a label first, in their order, then others: a stable sort.
    places = (of_part == IGNORED).to(torch.int8).sort(dim=1, stable=True).indices[:, :each]
    at = (places + room * torch.arange(parts)[:, None]).view(-1)
    return torch.cat([wide.view(-1), at, labels.view(-1)[at]]), (rows, full, each, parts)


def rounded(n: int) -> int:
    """The least multiple of 32, or for long rows of an eighth of the power of two above n, that is not below n."""
    step = max(EDGE, 1 << max(0, n.bit_length() - 3))
    return -(-n // step) * step


def state_of(model: nn.Module) -> State | None:
    """What a recording depends on besides its inputs; None where there should be none."""
    if not fast.plain(model):
        return None
    out: list[Any] = [model.training]
    for a in book_of(model).adapters.values():
        rows = a._switch.rows
        if not a.on or a.merged:
            continue
        if a.copies or a.added or isinstance(rows, Tensor):
            return None
        out += [id(a), a._switch.batch, None if rows is None else (rows.start, rows.stop)]
        for f in a._factors.values():
            out += [f.scaling, f.A.data_ptr(), f.B.data_ptr()]
    return tuple(out)


# ---- what is done with them
def adamw(groups: list[dict[str, Any]], lr: float, capturable: bool = False) -> torch.optim.AdamW:
    """AdamW, all parameters in one call where this device can."""
    fused = all(p.device.type in ("cpu", "cuda") for g in groups for p in g["params"])
    return torch.optim.AdamW(groups, lr=lr, fused=fused, capturable=capturable)


class Update:
    """A step of AdamW on parameters whose gradient is clipped, and the way back from it.

    groups  AdamW's, of the same parameters; each has a `ratio`, by which the learning rate is multiplied
    clip    largest norm of the gradient of all parameters together; 0 for no clipping
    """

    def __init__(self, params: Sequence[nn.Parameter], groups: list[dict[str, Any]], lr: float, clip: float) -> None:
        self.params: list[Any] = list(params)
        self.clip, self.gpu = clip or math.inf, all(p.is_cuda for p in self.params)
        self.optimizer = adamw(groups, lr, self.gpu)
        # The factors before the last step and before the one before: a loss is known to be bad one step late.
        self.last, self.good = ([p.detach().clone() for p in self.params] for _ in range(2))
        self.norm = torch.zeros((), device=self.params[0].device)
        self.work: Callable[[], None] = self._run
        if self.gpu:
            self.work = Recorded(self._run, torch.cuda.graph_pool_handle())
            for g in self.optimizer.param_groups:
                g["lr"] = torch.tensor(lr, device=self.norm.device)

    def __call__(self, lr: float) -> Tensor:
        """The step, after which gradients are zero; the gradient's norm before it was clipped ()."""
        for g in self.optimizer.param_groups:
            if self.gpu:
                g["lr"].fill_(lr * g["ratio"])
            else:
                g["lr"] = lr * g["ratio"]
        self.work()
        return self.norm

    @torch.no_grad()
    def _run(self) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.clip)
        _torch._foreach_copy_(self.good, self.last)
        _torch._foreach_copy_(self.last, self.params)
        self.optimizer.step()
        if self.gpu:
            _torch._foreach_zero_([p.grad for p in self.params if p.grad is not None])
        else:
            self.optimizer.zero_grad()
        self.norm.copy_(norm)

    def close(self) -> None:
        if isinstance(self.work, Recorded):
            self.work.close()

    @torch.no_grad()
    def start_here(self) -> None:
        """The factors as they are now are those of a step whose loss was finite: after a checkpoint was read."""
        _torch._foreach_copy_(self.last, self.params)
        _torch._foreach_copy_(self.good, self.params)

    @torch.no_grad()
    def undo(self) -> None:
        """Back to the factors of the last step whose loss was finite, from a step whose loss or gradient was not."""
        _torch._foreach_copy_(self.params, self.good)
