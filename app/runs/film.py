"""The film of a training: the singular values of every ΔW, a picture every few steps, beside the norms in the events.

The factors are small, so a picture of all 60 updates of the default takes some 10 ms. How often one is taken follows
from what the last ones took: all of them together stay below `SHARE` of the time of the steps, whatever the rank.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_core.adapter import Adapter

PICTURES = 48  # of a whole run, besides the first steps, where B leaves zero
EARLY = 4  # steps at the beginning that have a picture each
SHARE = 0.025  # of the time of the steps
MOST = 32  # singular values of one matrix: what is behind them would not be seen


class Film:
    """Takes the pictures of one training. DoRA's ΔW is no product of its factors: it has no film."""

    def __init__(self, adapter: Adapter, steps: int, clock: Any = time.perf_counter) -> None:
        self.adapter, self.clock = adapter, clock
        self.every = max(1, math.ceil(steps / PICTURES))
        self.on = bool(adapter.sites) and not adapter.spec.dora
        self.spent = self.last = self.began = 0.0

    def begin(self, train_s: float) -> dict[str, list[float]] | None:
        """The picture before the first step (B = 0); train_s: what a resumed run had trained already."""
        self.began = train_s
        return self.take() if self.on else None

    def after(self, step: int, train_s: float, end: bool = False) -> dict[str, list[float]] | None:
        """The picture after a step, {key: σ, largest first}, or None where none is taken.

        train_s  seconds that the steps have taken so far
        end      the last one is always taken
        """
        due = end or step <= EARLY or step % self.every == 0
        allowed = end or self.spent + self.last <= SHARE * (train_s - self.began)
        return self.take() if self.on and due and allowed else None

    def take(self) -> dict[str, list[float]]:
        from lora_core.spectra import spectra

        at = self.clock()
        found = {k: [float(f"{v:.4g}") for v in s.singular_values[:MOST]] for k, s in spectra(self.adapter).items()}
        self.last = self.clock() - at
        self.spent += self.last
        return found
