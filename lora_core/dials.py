"""Dials on an adapter: its ΔW cut, scaled and switched off matrix by matrix, while the adapter stays as it is.

A second adapter of the same matrices holds ΔW in its balanced form, B = U·√σ and A = √σ·Vᵀ, so that a cut is a zero in
some columns of B, and turning a dial is one pass over B: no SVD, nothing attached anew. Many of them, each with other
dials, are measured in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_core.adapter import Adapter, put_on
from lora_core.adapter import rows as per_row
from lora_core.delta import Delta
from lora_core.errors import UserError
from lora_core.registry import book_of, get_adapter

Ranks = Mapping[str, int] | int | None  # {matrix: directions kept}, the same number for all, or None for all of ΔW
TOKENS = 1024  # in one batch of many adapters


class Dials:
    """An adapter with dials.

    adapter  the one that is looked at; it is not changed
    whole    {matrix: its s·B·A as a balanced Delta}
    What was trained beside s·B·A (norms, a head, DoRA's magnitudes) is not on the dials and goes on acting. Raises
    UserError for an adapter without low-rank updates.
    """

    def __init__(self, adapter: Adapter) -> None:
        if not adapter.sites:
            raise UserError(f"adapter {adapter.name!r} has no low-rank updates to cut")
        self.adapter = adapter
        self.whole: dict[str, Delta] = {}
        for key in adapter.sites:
            f = adapter.factors(key)
            B, A = f.factored()
            self.whole[key] = Delta(B, A, f.scaling).balanced()

    @property
    def ranks(self) -> dict[str, int]:
        """{matrix: how many directions it has}."""
        return {key: d.rank for key, d in self.whole.items()}

    def is_base(self, ranks: Ranks = None, strength: float = 1.0) -> bool:
        """Whether nothing of s·B·A is left."""
        return strength == 0 or not any(self._kept(ranks).values())

    def attach(self, ranks: Ranks = None, strength: float = 1.0, name: str | None = None) -> Adapter:
        """A second adapter beside the first, off, with its dials turned to these; `turn` turns them further.

        name: None for one that is free. Errors as in `turn`.
        """
        taken = book_of(self.adapter.model).adapters
        if name is None:
            name = f"{self.adapter.name[:80]}-dials"
            while name in taken:
                name += "-"
        a = self.adapter
        tensors = {key: (d.A, d.B.clone(), 1.0) for key, d in self.whole.items()}  # A is never written to
        magnitudes = {key: m.detach() for key in self.whole if (m := a.factors(key).m) is not None}
        copies = {n: c.detach() for n, c in a.copies.items()}
        spec = replace(a.spec, mask=0.0, dropout=0.0)
        made = put_on(a.model, spec, name, list(a.sites.values()), tensors, magnitudes, copies, a.added)
        made.enable(False)
        self.turn(made, ranks, strength)
        return made

    @torch.no_grad()
    def turn(self, made: Adapter, ranks: Ranks = None, strength: float = 1.0) -> None:
        """Every s·B·A of an adapter from `attach` cut to its rank and multiplied by strength; 0 switches it off.

        Raises UserError for a negative rank.
        """
        for key, k in self._kept(ranks).items():
            B = made.factors(key).B
            B.zero_()
            B[:, :k] = self.whole[key].B[:, :k] * strength

    def _kept(self, ranks: Ranks) -> dict[str, int]:
        each = {key: ranks.get(key, 0) if isinstance(ranks, Mapping) else ranks for key in self.whole}
        if any(k is not None and k < 0 for k in each.values()):
            raise UserError("a matrix keeps 0, 1, 2 … directions; a negative number was given")
        return {key: d.rank if (k := each[key]) is None else min(k, d.rank) for key, d in self.whole.items()}


# ---- measuring many at once ------------------------------------------------------------------------------------------
@torch.no_grad()
def losses_together(objective: Any, items: Sequence[Any], adapters: Sequence[str | None], *, begin: int = 0,
                    tokens: int = TOKENS) -> Iterator[tuple[int, list[float], int]]:  # fmt: skip
    """Losses of several adapters (None: the base) on the same encoded rows, all of them in each batch.

    Yields (rows of the batch, the sum of every adapter's losses over them in nats, labelled tokens of the batch), in
    the order of the items from number `begin` on, so that a measurement can go on where it was broken off.

    objective  one that has `losses`, such as `CausalLM`
    tokens     of a batch, all adapters together, as far as one row of each fits
    """
    model: nn.Module = objective.model
    was, at = model.training, begin
    while at < len(items):
        take, longest = 0, 0
        while at + take < len(items) and (
            not take or max(longest, len(items[at + take])) * (take + 1) * len(adapters) <= tokens
        ):
            longest = max(longest, len(items[at + take]))
            take += 1
        rows = list(items[at : at + take])
        batch = objective.batch(rows * len(adapters))
        model.eval()
        try:
            with per_row(model, list(adapters)):
                sums = [float(x) for x in objective.losses(batch, len(adapters))]
        finally:
            model.train(was)
        at += take
        yield take, sums, batch.labelled // len(adapters)


class Interrupted(Exception):
    """Raised out of a forward pass within `interruptible`."""


@contextmanager
def interruptible(model: nn.Module, adapters: Sequence[str | None], stop: Callable[[], bool]) -> Iterator[None]:
    """Within the block a forward pass of the model ends with `Interrupted` soon after stop() has become True, which is
    asked before every module that one of these adapters is on."""

    def ask(*_: Any) -> None:
        if stop():
            raise Interrupted

    hosts = {id(m): m for n in adapters if n is not None for m in get_adapter(model, n)._hosts.values()}
    hooks = [m.register_forward_pre_hook(ask) for m in hosts.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
