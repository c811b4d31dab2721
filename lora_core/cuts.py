"""What rank would have been enough, measured: the held-out loss of an adapter whose ΔW is cut to rank k."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lora_core.adapter import Adapter
from lora_core.dials import Dials
from lora_core.errors import UserError
from lora_core.evaluate import measure
from lora_core.frames import frame

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
    dials = Dials(adapter)
    most = max(dials.ranks.values())
    cuts: dict[int, dict[str, float]] = {}
    base = measure(objective(adapter), rows, adapters=[None])[None]

    def loss(k: int) -> float:
        if k not in cuts:
            if k == 0 and not adapter.copies and not adapter.added and not adapter.spec.dora:
                cuts[k] = base
            elif k == most:
                cuts[k] = measure(objective(adapter), rows, adapters=[adapter.name])[adapter.name]
            else:
                cut = dials.attach(k)
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
