"""What rank would have been enough, measured: the held-out loss of an adapter whose ΔW is cut to rank k."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_core.adapter import Adapter, put_on
from lora_core.delta import Delta
from lora_core.errors import UserError
from lora_core.evaluate import measure
from lora_core.frames import frame
from lora_core.registry import book_of

if TYPE_CHECKING:
    import pandas

    from lora_core.objective import Objective
    from lora_core.tasks import Row

WITHIN = 0.01  # of the whole adapter's gain


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """Held-out figures of the cuts of an adapter; as `measure` has them, "loss" among them.

    base            of the model without the adapter
    cuts            {k: figures with every s·B·A cut to its k first directions}; the largest k is the whole adapter.
                    k = 0 is the base, unless something was trained itself (norms, a head, DoRA's magnitudes)
    gain            the loss of the base less that of the whole adapter, in nats
    suggested_rank  the least k that keeps 99 % of that gain; 0 if there is none
    """

    base: dict[str, float]
    cuts: dict[int, dict[str, float]]
    gain: float
    suggested_rank: int

    def to_frame(self) -> pandas.DataFrame:
        """A row for each cut: its rank and its figures, as a pandas DataFrame."""
        return frame({"rank": k, **v} for k, v in self.cuts.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the cuts as [{rank, loss, …}]."""
        return {**asdict(self), "cuts": [{"rank": k, **v} for k, v in self.cuts.items()]}


def measure_cuts(adapter: Adapter, objective: Callable[[Adapter], Objective], rows: Sequence[Row], *,
                 tell: Callable[[int, float], None] | None = None) -> Cuts:  # fmt: skip
    """Measure k = 0, 1, 2, 4, … and the whole adapter on held-out rows, then halve the interval where enough begins.

    objective  makes it for the adapter that it is given: `lambda a: CausalLM(a.model, tokenizer, template)`; a
               `Preference` compares with the model without just that adapter
    tell       called with k and its loss as soon as that is known

    One pass over the rows for the base, the whole and each cut: about 2·log₂ of the rank. Raises UserError without rows
    or without low-rank updates.
    """
    if not rows:
        raise UserError("there are no held-out rows to measure the cuts on")
    if not adapter.sites:
        raise UserError(f"adapter {adapter.name!r} has no low-rank updates to cut")
    whole = {}
    for key in adapter.sites:
        f = adapter.factors(key)
        B, A = f.factored()
        whole[key] = Delta(B, A, f.scaling).balanced()
    most = max(d.rank for d in whole.values())
    cuts: dict[int, dict[str, float]] = {}
    base = measure(objective(adapter), rows, adapters=[None])[None]

    def loss(k: int) -> float:
        if k not in cuts:
            if k == 0 and not adapter.copies and not adapter.added and not adapter.spec.dora:
                cuts[k] = base
            elif k == most:
                cuts[k] = measure(objective(adapter), rows, adapters=[adapter.name])[adapter.name]
            else:
                cut = _attach_cut(adapter, whole, k)
                try:
                    cuts[k] = measure(objective(cut), rows, adapters=[cut.name])[cut.name]
                finally:
                    cut.detach()
            if tell:
                tell(k, cuts[k]["loss"])
        return cuts[k]["loss"]

    gain = base["loss"] - loss(most)

    def enough(k: int) -> bool:
        return base["loss"] - loss(k) >= (1 - WITHIN) * gain

    ks = [0, *(1 << i for i in range(most.bit_length()) if 1 << i < most), most]
    passed = [k for k in ks if enough(k)]  # all of them: the curve is worth seeing
    if gain <= 0:
        least = 0
    else:
        least = passed[0]
        short = max((k for k in ks if k < least), default=-1)
        while least - short > 1:
            middle = (least + short) // 2
            least, short = (middle, short) if enough(middle) else (least, middle)
    return Cuts(base=base, cuts=dict(sorted(cuts.items())), gain=gain, suggested_rank=least)


def _attach_cut(adapter: Adapter, whole: dict[str, Delta], k: int) -> Adapter:
    """A second adapter beside the first, off: the same but for s·B·A, which is cut to rank k."""
    tensors, magnitudes = {}, {}
    for key, d in whole.items():
        n = max(1, min(k, d.rank))  # rank 0 is one direction of nothing
        tensors[key] = (d.A[:n], d.B[:, :n] * bool(k), d.scaling)
        m = adapter.factors(key).m
        if m is not None:
            magnitudes[key] = m.detach()
    taken, name = book_of(adapter.model).adapters, f"{adapter.name[:80]}-cut-{k}"
    while name in taken:
        name += "-"
    copies = {n: c.detach() for n, c in adapter.copies.items()}
    cut = put_on(adapter.model, replace(adapter.spec, mask=0.0), name, [*adapter.sites.values()], tensors, magnitudes,
                 copies, adapter.added)  # fmt: skip
    cut.enable(False)
    return cut
