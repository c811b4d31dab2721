"""How A and B start (section 4.1: A Gaussian, B zero; and what came later). Whatever the start, ΔW = 0 at first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lora_core.adapter import Adapter
    from lora_core.objective import Objective

GAMMA = 16.0  # of LoRA-GA's stable scale


def initial_A(init: str, rank: int, in_: int, generator: torch.Generator) -> Tensor:
    """A (rank, in) at the start, float32, drawn on the CPU so that a seed means the same everywhere.

    "gaussian": N(0, 1/in), the paper's random Gaussian with the spread that keeps A·x of x's size.
    "kaiming": U(−1/√in, 1/√in), what the paper's own code does (kaiming_uniform with a = √5).
    "orthogonal": random rows at right angles, of the length that Gaussian ones have on average.
    "pissa" and "gradient" begin as "gaussian" and are then replaced by `pissa` and `from_gradient`.
    """
    A = torch.empty(rank, in_)
    if init == "kaiming":
        return A.uniform_(-1 / math.sqrt(in_), 1 / math.sqrt(in_), generator=generator)
    A.normal_(0, 1 / math.sqrt(in_), generator=generator)
    return torch.linalg.qr(A.T)[0].T.contiguous() if init == "orthogonal" else A


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's own generator from a seed, and as it was afterwards (svd_lowrank draws from it)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def pissa(adapter: Adapter, seed: int = 0) -> None:
    """Start from W0's own top r directions: s·B0·A0 is its best approximation of rank r (PiSSA, arXiv 2404.02948).

    Both factors get √σ. What is trained are the directions that matter most to W0, and ΔW = s·(B·A − B0·A0).
    """
    with seeded(seed):
        for key in adapter.sites:
            f = adapter.factors(key)
            W0, r = adapter.W0(key).to(f.A.dtype), f.A.shape[0]
            U, S, V = torch.svd_lowrank(W0, q=min(2 * r + 8, *W0.shape), niter=6)
            root = (S[:r] / abs(f.scaling)).sqrt()
            f.anchor(root[:, None] * V[:, :r].T, U[:, :r] * root)


def from_gradient(adapter: Adapter, objective: Objective, items: Sequence[Any], seed: int = 0) -> None:
    """Start along the first gradient G of each full matrix (LoRA-GA, arXiv 2407.05000).

    A0 is G's first r right-singular vectors, B0 its next r left ones, both times out^¼/√γ with γ = 16, so that the
    first step moves ΔW as full fine-tuning would. G is that of the mean loss of `items`, taken in one batch.
    """
    batch = objective.batch(items)
    grads: dict[str, Tensor] = {}
    hooks = [_record(adapter, key, grads) for key in adapter.sites]
    try:
        (objective.loss(batch) / batch.labelled).backward()
    finally:
        for h in hooks:
            h.remove()
    for p in adapter.parameters():
        p.grad = None
    with torch.no_grad(), seeded(seed):
        for key, G in grads.items():
            f = adapter.factors(key)
            r, out = f.A.shape[0], G.shape[0]
            U, _, V = torch.svd_lowrank(G.to(f.A.dtype), q=min(4 * r, *G.shape), niter=4)
            first = min(r, U.shape[1] - r)  # where out or in is below 2r, B0 takes the last r that there are
            size = out**0.25 / math.sqrt(GAMMA)
            f.anchor(size * V[:, :r].T, size * U[:, first : first + r])


def _record(adapter: Adapter, key: str, grads: dict[str, Tensor]) -> Any:
    """A hook that adds gᵀ·x, the gradient of the whole matrix (out, in) of a site, to grads[key]."""
    site = adapter.sites[key]

    def forward(_: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = args[0].detach()

        def backward(g: Tensor) -> None:
            g = g if site.rows is None else g[..., site.rows]
            G = g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            grads[key] = grads[key] + G if key in grads else G

        if not out.requires_grad:
            out = out.requires_grad_()
        out.register_hook(backward)
        return out

    return adapter.model.get_submodule(site.path).register_forward_hook(forward)
