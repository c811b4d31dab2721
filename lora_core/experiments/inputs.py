"""What the matrices of a model are given: their inputs, and the gradients of the loss, on some rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lora_core.objective import Objective
    from lora_core.sites import Site
    from lora_core.tasks import Row

RIDGE = 1e-3  # of the mean eigenvalue, added to a covariance: fewer tokens than inputs leave it singular
ROWS = 32  # in a forward pass


Heard = tuple[Iterator[Any], dict[str, list[Tensor]]]


@contextmanager
def _listening(goal: Objective, sites: Sequence[Site], rows: Sequence[Row]) -> Iterator[Heard]:
    """(batches of the rows, {path: inputs of the last batch}) with the model in evaluation mode."""
    model: Any = goal.model
    seen: dict[str, list[Tensor]] = {s.path: [] for s in sites}
    hooks = [model.get_submodule(p).register_forward_pre_hook(lambda _, x, p=p: seen[p].append(x[0].detach()))
             for p in seen]  # fmt: skip
    was = model.training
    model.eval()
    items = goal.encode(rows)
    try:
        yield (goal.batch(items[i : i + ROWS]) for i in range(0, len(items), ROWS)), seen
    finally:
        model.train(was)
        for h in hooks:
            h.remove()


def inputs(goal: Objective, sites: Sequence[Site], rows: Sequence[Row]) -> dict[str, Tensor]:
    """{path: X (tokens, in)}, the inputs of the modules at all tokens of the rows but padding, in float64."""
    found: dict[str, list[Tensor]] = {s.path: [] for s in sites}
    with torch.no_grad(), _listening(goal, sites, rows) as (batches, seen):
        for b in batches:
            goal.loss(b)
            real = getattr(b, "mask", None)
            for p, x in seen.items():
                x0 = x.pop()
                found[p].append(x0[real.bool()] if real is not None else x0.flatten(0, -2))
                x.clear()
    return {p: torch.cat(x).double() for p, x in found.items()}


def gradients(goal: Objective, sites: Sequence[Site], rows: Sequence[Row]) -> dict[str, Tensor]:
    """{key: ∂L/∂W (out, in)} of the mean loss over the rows, at the weights as they are."""
    model: Any = goal.model
    params = {s.path: getattr(model.get_submodule(s.path), s.param) for s in sites}
    before = {p: w.requires_grad for p, w in params.items()}
    count = 0
    try:
        for w in params.values():
            w.requires_grad_(True)
            w.grad = None
        with _listening(goal, (), rows) as (batches, _):
            for b in batches:
                goal.loss(b).backward()
                count += b.labelled
        return {s.key: s.of(params[s.path].grad).detach().double() / count for s in sites}
    finally:
        for p, w in params.items():
            w.grad = None
            w.requires_grad_(before[p])


def root(X: Tensor) -> tuple[Tensor, Tensor]:
    """C^½ and C^−½ of C = XᵀX/n (in, in) with a small ridge; n: rows of X."""
    C = X.T @ X / len(X)
    values, Q = torch.linalg.eigh(C)
    values = values.clamp_min(0) + RIDGE * values.mean()
    return Q * values.sqrt() @ Q.T, Q / values.sqrt() @ Q.T


def directions(D: Tensor, roots: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """B (out, n) and A (n, in) with D = B·A, whose first k columns and rows make the best cut of D to rank k.

    Best is nearest to D; with roots it is nearest on the inputs: Σ‖(D − B·A)x‖² over them is least.
    """
    U, S, Vh = torch.linalg.svd(D if roots is None else D @ roots[0], full_matrices=False)
    return U * S, Vh if roots is None else Vh @ roots[1]
