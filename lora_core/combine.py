"""New adapters out of attached ones, and switching tasks as the paper does it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from lora_core.adapter import Adapter, put_on
from lora_core.delta import Delta
from lora_core.errors import UserError, unknown
from lora_core.merging import wide
from lora_core.quantised import Bits
from lora_core.registry import book_of, get_adapter
from lora_core.sites import Site
from lora_core.spec import LoraSpec

METHODS = ("sum", "svd", "factors")


def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    *,
    method: Literal["sum", "svd", "factors"] = "sum",
    rank: int | None = None,
) -> Adapter:
    """Attach a new adapter made of attached ones, {name: weight}; those stay, and what acted goes on acting.

    "sum"      ΔW = Σ wᵢ·ΔWᵢ exactly: the factors side by side, so the rank is the sum of the ranks (concatenation)
    "svd"      the best approximation of that sum of rank `rank` (the largest of the ranks): off by exactly the energy
               of the singular values that are cut
    "factors"  B = Σ √wᵢ·Bᵢ, A = Σ √wᵢ·Aᵢ (weights ≥ 0, equal ranks and matrices): ΔW is the sum plus the cross terms
               √(wᵢwⱼ)·Bᵢ·Aⱼ, so it is the sum only where those vanish

    What the adapters trained themselves (norms, biases, heads) is added up in the same way, whatever the method. The
    new adapter is off; `switch` to it. Raises UserError for names, weights or ranks that do not go together.
    """
    if method not in METHODS:
        raise unknown("method", str(method), METHODS)
    if not weights:
        raise UserError("nothing to combine: give the names of attached adapters with their weights")
    parts = {n: get_adapter(model, n) for n in weights}
    if new := next((a for a in parts.values() if a.added), None):
        raise UserError(f"{new.name!r} has a bottleneck or a prefix, and those do not add up")
    sites: dict[str, Site] = {}
    for a in parts.values():
        sites |= a.sites
    deltas: dict[str, Delta] = {}
    for key in sites:
        terms = [(w, parts[n].delta(key)) for n, w in weights.items() if key in parts[n].sites]
        if method == "factors":
            deltas[key] = _by_factors(key, terms, len(parts))
            continue
        total = terms[0][0] * terms[0][1]
        for w, d in terms[1:]:
            total = total + w * d
        deltas[key] = (
            total.truncate(min(rank or max(d.rank for _, d in terms), *total.shape)) if method == "svd" else total
        )
    ranks = {key: d.rank for key, d in deltas.items()}
    top = max(ranks.values(), default=1)
    odd = {k: r for k, r in ranks.items() if r != top}
    copies = {k: c.detach() for k, c in _copies(model, {n: (w, parts[n]) for n, w in weights.items()}).items()}
    spec = LoraSpec(targets=tuple(sites) or ("norm",), rank=top, alpha=top, rank_pattern=odd, full=tuple(copies),
                    alpha_pattern={k: float(r) for k, r in odd.items()})  # fmt: skip
    tensors = {key: (d.A, d.scaling * d.B, 1.0) for key, d in deltas.items()}
    adapter = put_on(model, spec, name, list(sites.values()), tensors, copies=copies)
    adapter.enable(False)
    return adapter


def _copies(model: nn.Module, parts: Mapping[str, tuple[float, Adapter]]) -> dict[str, torch.Tensor]:
    """{"path.name": W + Σ wᵢ·(copyᵢ − W)} of what the adapters trained themselves."""
    out: dict[str, torch.Tensor] = {}
    kept = book_of(model).kept
    for w, a in parts.values():
        for key, copy in a.copies.items():
            own = model.get_parameter(key)
            bits = kept.get(own, own)
            W = own if isinstance(bits, Bits) else bits
            out[key] = out.get(key, W.to(copy.dtype)) + w * (copy - W)
    return out


def _by_factors(key: str, terms: list[tuple[float, Delta]], parts: int) -> Delta:
    if len(terms) != parts or len({d.rank for _, d in terms}) != 1 or any(w < 0 for w, _ in terms):
        raise UserError(
            f"method 'factors' needs weights ≥ 0 and equal ranks and matrices; {key} differs. Use 'sum' or 'svd'"
        )
    # Each part's scaling goes half into either factor, so that B·A of one part alone is its ΔW.
    half = [(abs(w * d.scaling) ** 0.5, d) for w, d in terms]
    return Delta(torch.stack([h * d.B for h, d in half]).sum(0), torch.stack([h * d.A for h, d in half]).sum(0))


def subtract_add(model: nn.Module, old: str | None, new: str | None) -> None:
    """Switch tasks as section 4.1 says: W ← W − s·B·A + s'·B'·A', in place and in the weights' own dtype.

    No copy of W0 is kept, and every switch rounds: W drifts away from W0 (measure it with `drift`). `switch` and
    `merge` keep the bits instead. None for old or new: only add, or only subtract. Both adapters must be unmerged and
    are turned off: their updates are in the weights.
    """
    for name, sign in ((old, -1.0), (new, 1.0)):
        if name is None:
            continue
        a = get_adapter(model, name)
        if a.merged:
            raise UserError(f"adapter {name!r} is merged with W0's bits kept; unmerge() it first")
        a.enable(False)
        with torch.no_grad():
            for weight, change in list(a.changes()):
                weight.copy_(wide(weight) + sign * change)


def drift(weight: torch.Tensor, W0: torch.Tensor) -> tuple[float, float]:
    """(share of the entries whose bits differ, ‖W − W0‖_F / ‖W0‖_F): how far switching has carried a weight away."""
    changed = float((weight != W0).double().mean())
    return changed, float((weight.double() - W0.double()).norm() / W0.double().norm())
