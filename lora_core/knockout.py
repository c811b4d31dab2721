"""Which matrices hold an adapter's gain: the held-out loss shared out among them, and the few that hold most of it.

Knocking out every subset of matrices is out of reach, and one after the other takes a pass over the rows for each. So
the gain is shared out along the way from the base model to the adapted one: with all ΔW multiplied by c,

    L(0) − L(1) = −∫₀¹ Σ_m ⟨∂L/∂ΔW_m, ΔW_m⟩ dc,

and what matrix m adds to that integral is its share (Aumann and Shapley's; "integrated gradients"). The shares sum to
the gain, and all of them come out of one backward pass for each point of a Gauss–Legendre rule. A share is not what is
lost without the matrix, since matrices act together: so the chosen ones are measured, with all others switched off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from lora_core.adapter import rows as per_row
from lora_core.dials import Dials, losses_together
from lora_core.errors import UserError
from lora_core.machine import keep_heap

POINTS = 4  # of the Gauss–Legendre rule
ROWS = 4  # in one backward pass


@dataclass(frozen=True, kw_only=True)
class Holders:
    """The matrices that hold most of an adapter's gain.

    shares   {matrix: nats a token that it adds to the gain along the way from base to adapted}, largest first
    keys     the chosen matrices; share: how many of all they are
    base, whole, kept  measured held-out loss of the base, of all matrices, and of the chosen ones alone, nats a token
    held     (base − kept) / (base − whole), the share of the gain that they keep; NaN where there is no gain
    """

    shares: dict[str, float]
    keys: tuple[str, ...]
    share: float
    base: float
    whole: float
    kept: float
    held: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def gain_shares(dials: Dials, objective: Any, items: Sequence[Any], *, points: int = POINTS,
                tell: Callable[[float], None] | None = None) -> dict[str, float]:  # fmt: skip
    """{matrix: its share of L(base) − L(adapted)} over encoded rows, nats a labelled token, the largest first.

    objective  one that has `loss`; items: its encoded rows, at least one
    tell       called with the share of the work that is done

    A forward and a backward pass over the rows for each point. What was trained beside s·B·A acts all the while.
    """
    if not items:
        raise UserError("there are no held-out rows to share the gain out over")
    model = objective.model
    made = dials.attach()
    factors = {key: made.factors(key) for key in dials.whole}
    was = model.training
    ordered = sorted(items, key=len)
    batches = [objective.batch(ordered[i : i + ROWS]) for i in range(0, len(ordered), ROWS)]
    labelled = sum(b.labelled for b in batches)
    shares = dict.fromkeys(factors, 0.0)
    nodes, weights = np.polynomial.legendre.leggauss(points)
    done = 0
    try:
        for p in made.parameters():
            p.requires_grad_(False)
        for f in factors.values():
            f.B.requires_grad_(True)
        model.eval()
        with keep_heap(), per_row(model, [made.name]):
            for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
                dials.turn(made, None, float(node))
                for batch in batches:
                    with torch.enable_grad():
                        grads = torch.autograd.grad(objective.loss(batch) / labelled, [f.B for f in factors.values()])
                    for key, g in zip(factors, grads, strict=True):
                        shares[key] -= float(weight) * float((g.double() * dials.whole[key].B.double()).sum())
                    done += 1
                    if tell:
                        tell(done / (points * len(batches)))
    finally:
        model.train(was)
        made.detach()
    return dict(sorted(shares.items(), key=lambda s: -s[1]))


def holders(dials: Dials, objective: Any, items: Sequence[Any], share: float = 0.2, *, points: int = POINTS,
            shared: Sequence[Any] | None = None, tell: Callable[[float], None] | None = None) -> Holders:  # fmt: skip
    """The `share` of the matrices with the largest shares of the gain, and what they keep of it, measured.

    items   encoded held-out rows that the losses are measured on; shared: those of `gain_shares` (None: the same)
    Raises UserError for a share outside (0, 1], and without rows.
    """
    if not 0 < share <= 1:
        raise UserError(f"share is {share:g}; it is above 0 and at most 1: 0.2 for a fifth of the matrices")
    shares = gain_shares(dials, objective, items if shared is None else shared, points=points, tell=tell)
    keys = tuple(list(shares)[: max(1, round(share * len(shares)))])
    base, whole, kept = measured(dials, objective, items, keys)
    held = (base - kept) / (base - whole) if base > whole else math.nan
    return Holders(shares=shares, keys=keys, share=len(keys) / len(shares), base=base, whole=whole, kept=kept,
                   held=held)  # fmt: skip


def measured(dials: Dials, objective: Any, items: Sequence[Any], keys: Sequence[str]) -> tuple[float, float, float]:
    """Mean loss over encoded rows of the base, of all matrices and of these alone, in one batch; nats a token."""
    few = dials.attach({k: dials.ranks[k] for k in keys})
    sums, count = np.zeros(3), 0
    try:
        for _, values, labelled in losses_together(objective, items, [None, dials.adapter.name, few.name]):
            sums, count = sums + values, count + labelled
    finally:
        few.detach()
    base, whole, kept = (sums / max(1, count)).tolist()
    return base, whole, kept
