"""ΔW into the weights and out again (section 4.1), so that merging, unmerging and switching lose no bit of W0."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lora_core.adapted import Adapted
from lora_core.errors import UserError
from lora_core.layers import Factors, Part, Switch
from lora_core.quantised import Bits, check_merge, is_quantised, keep, loss_of_merge, write
from lora_core.registry import book_of
from lora_core.sites import plain_weight
from lora_core.swaps import Copies

if TYPE_CHECKING:
    from lora_core.spec import LoraSpec


class Merging:
    """The part of an Adapter that changes weights."""

    name: str
    model: nn.Module
    spec: LoraSpec
    _switch: Switch
    _hosts: dict[str, nn.Module]

    @property
    def merged(self) -> bool:
        return self._switch.merged

    def _attached(self) -> None:
        if book_of(self.model).adapters.get(self.name) is not self:
            raise UserError(f"adapter {self.name!r} is not attached to this model any more")

    # ---- into the weights and out again
    def merge(self, requantise: bool = False) -> dict[str, float]:
        """Add ΔW to the weights: computed in float32 (float64 for float64 weights) and rounded once (section 4.1).

        The weights' own bits are kept aside, so that `unmerge` gives back exactly them. Needs that much memory.
        A quantised weight must be decoded, changed and quantised again, which loses much of a small ΔW: that is done
        only with `requantise`, and {site: ‖what is lost‖_F / ‖ΔW‖_F} is returned; {} for other weights.
        Raises UserError for bottlenecks and prefixes; on a quantised base without `requantise`, saying what would be
        lost; for a weight that other modules use too, which this adapter does not adapt; and beside a DoRA adapter of
        the same matrices.
        """
        self._attached()
        if self.merged:
            return {}
        self._check_mergeable()
        check_merge(self, requantise)
        self._switch.merged = True
        rewrite(self.model, self.weights())
        return loss_of_merge(self, book_of(self.model).kept)

    def unmerge(self) -> None:
        """Take ΔW out of the weights again; with no other adapter merged, they are W0 to the bit."""
        self._attached()
        if self.merged:
            self._switch.merged = False
            rewrite(self.model, self.weights())

    def weights(self) -> dict[nn.Parameter, nn.Module]:
        """The parameters that this adapter changes, each with a module that has it."""
        found: dict[nn.Parameter, nn.Module] = {}
        for host in self._hosts.values():
            for p in _parts(host):
                if p.switch is self._switch:
                    for name in p.params:
                        found.setdefault(cast(nn.Parameter, host._parameters[name]), host)
        return found

    def changes(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """(parameter, what merging adds to it) of every weight that the adapter changes; at least float32."""
        kept = book_of(self.model).kept
        for weight, host in self.weights().items():
            yield weight, _change(weight, host, [self._switch], kept)

    def _check_mergeable(self) -> None:
        """UserError for what cannot be in the weights, before anything changes."""
        for name in ("bottleneck", "prefix"):
            if getattr(self.spec, name):
                raise UserError(f"adapter {self.name!r} has a {name}, which no weight can hold: it cannot be merged")
        self._check_tied()
        self._check_dora()

    def _check_tied(self) -> None:
        """A weight that another module uses too must not be changed behind its back."""
        weights = self.weights()
        uses = Counter(p for m in self.model.modules() for p in m._parameters.values() if p in weights)
        if max(uses.values(), default=1) == 1:
            return
        mine = {p: self._parts_on(p, host) for p, host in weights.items()}
        for path, module in self.model.named_modules(remove_duplicate=False):
            for p in module._parameters.values():
                if p is not None and p in mine and self._parts_on(p, module) != mine[p]:
                    raise UserError(
                        f"adapter {self.name!r} cannot be merged: {path} shares a weight that it adapts elsewhere (they"
                        " are tied), and would change with it. Go on unmerged"
                    )

    def _parts_on(self, weight: nn.Parameter, host: nn.Module) -> list[Part]:
        """What of this adapter acts on a weight in one of the modules that have it; nn.Modules compare by identity."""
        parts = _parts(host) if isinstance(host, Adapted) else []
        mine = [p for p in parts if p.switch is self._switch]
        return [p for p in mine if any(host._parameters[n] is weight for n in p.params) and not isinstance(p, Copies)]

    def _check_dora(self) -> None:
        """DoRA measures W0 itself, so a weight with something merged into it is not what it was trained beside."""
        for other in book_of(self.model).adapters.values():
            if other is not self and (self.spec.dora or other.spec.dora) and {*self.weights()} & {*other.weights()}:
                raise UserError(
                    f"adapters {self.name!r} and {other.name!r} are on the same matrices and one of them is DoRA, which"
                    " measures W0: merging one would change the other. Detach one of them first"
                )


@torch.no_grad()
def rewrite(model: nn.Module, weights: Mapping[nn.Parameter, nn.Module]) -> None:
    """Write W0 + the updates of all merged adapters into each weight, or the kept bits where none is merged."""
    book = book_of(model)
    merged = [a._switch for a in book.adapters.values() if a.merged]
    for weight, host in weights.items():
        mine = [p for p in _parts(host) if p.switch in merged]
        if weight not in book.kept:
            book.kept[weight] = keep(host) if is_quantised(weight) else weight.detach().clone()
        kept = book.kept[weight]
        if isinstance(kept, Bits):
            write(host, kept, _change(weight, host, merged, book.kept) if mine else None)
        elif not mine:
            weight.copy_(kept)
        elif not (len(mine) == 1 and isinstance(mine[0], Factors) and mine[0].sum_into(weight, kept)):
            weight.copy_(wide(kept) + _change(weight, host, merged, book.kept))
        if not mine:
            del book.kept[weight]


def wide(w: Tensor) -> Tensor:
    """At least float32, in which sums are formed before they are rounded."""
    return w.to(torch.float64 if w.dtype == torch.float64 else torch.float32)


def _parts(host: nn.Module) -> list[Part]:
    return [cast(Part, p) for p in cast(Adapted, host).lora.values()]


def _change(weight: nn.Parameter, host: nn.Module, switches: Sequence[Switch],
            kept: Mapping[nn.Parameter, Tensor | Bits]) -> Tensor:  # fmt: skip
    """What the adapters of these switches add to one weight of a host, together."""

    def W0(name: str) -> Tensor:
        own = kept.get(cast(nn.Parameter, host._parameters[name]))
        return wide(own.plain if isinstance(own, Bits) else plain_weight(host, name) if own is None else own).detach()

    total: Tensor | None = None
    for part in _parts(host):
        if part.switch in switches:
            for name, change in part.change(host, W0).items():
                if host._parameters[name] is weight:
                    total = change if total is None else total + change
    assert total is not None
    return total
