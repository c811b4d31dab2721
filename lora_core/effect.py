"""What a training did to a model: numbers, and one sentence that is a function of these numbers alone.

A loss that stood still can have many causes: a rate that is too small, too few steps, a target that hits nothing, two
factors that are both zero. `Effect` keeps the numbers that tell them apart; its `reason` is the rule, and `advice` what
to change. AdamW moves an entry of B by about the learning rate in a step, whatever the size of its gradient, so the sum
of the rates says how far B can have come.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Reason = Literal["", "diverged", "hits nothing", "both factors zero", "no gradient", "rate too large",
                 "learnt by heart", "scaling too small", "rate too small", "too few steps",
                 "little to gain"]  # fmt: skip
SHARE, NATS = 0.01, 0.02  # what is visible: so many most probable words changed, or so much loss
SMALL_RATE, USUAL_RATE, FEW_STEPS, USUAL_STEPS = 1e-4, 1e-3, 20, 60
NO_GRADIENT = 1e-6  # rounding alone leaves about 1e-7 where the true one is 0
SMALL_SCALING = 0.05  # of s; the paper's is about 1 to 2


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What a training did.

    delta, W0    ‖ΔW‖_F and ‖W0‖_F, each over all that was adapted together; delta/W0 is the `ratio`
    hit          matrices and vectors that were adapted
    both_zero    whether A and B are zero in every matrix: then both gradients are, and nothing can ever move
    gradient     largest gradient norm of a step; None where none was told
    steps, rates optimiser steps done, and the sum of their learning rates
    lr, scaling  the peak learning rate; the largest s of B·A
    rank         of the largest matrix's update
    changed      share of the held-out things whose most probable word (or label) is another one now; None: not measured
    counted, thing  how many these are, and what: "token" or "text"
    loss_before, loss_after    held-out loss in nats, without and with the adapter; None without held-out rows
    train_before, train_after  mean training loss of the first and of the last steps
    diverged     a loss or a gradient stopped being finite
    """

    delta: float
    W0: float
    hit: int
    both_zero: bool
    gradient: float | None
    steps: int
    rates: float
    lr: float
    scaling: float
    rank: int
    changed: float | None
    counted: int
    thing: Literal["token", "text"]
    loss_before: float | None
    loss_after: float | None
    train_before: float | None
    train_after: float | None
    diverged: bool

    # ---- the rule
    @property
    def ratio(self) -> float | None:
        """‖ΔW‖ over ‖W0‖; None where nothing that was adapted has a W0."""
        return self.delta / self.W0 if self.W0 else None

    @property
    def gain(self) -> float | None:
        """By how many nats the held-out loss fell; below 0 where it rose."""
        if self.loss_before is None or self.loss_after is None:
            return None
        return self.loss_before - self.loss_after

    @property
    def visible(self) -> bool | None:
        """Whether somebody would notice: 1 % of the most probable words, or 0.02 nats. None: nothing was held out."""
        if self.changed is None and self.gain is None:
            return None if self.delta else False
        loss = self.gain is not None and not abs(self.gain) < NATS
        return loss or (self.changed is not None and self.changed >= SHARE)

    @property
    def worse(self) -> bool:
        return self.gain is not None and not self.gain > -NATS

    @property
    def reason(self) -> Reason:
        """Why nothing is to be seen, or why it got worse; "" where there is an effect and it is a good one."""
        if self.diverged:
            return "diverged"
        little = max(NATS, 0.1 * (self.loss_before or 0.0))
        away = self.gain is not None and self.gain < little and (self.ratio or 0.0) > 1.0  # far from W0, for little
        if self.visible and not self.worse and not away:
            return ""
        if self.worse or away:
            first, last = self.train_before, self.train_after
            rose = first is not None and last is not None and not last < first
            return "rate too large" if rose or away else "learnt by heart"
        if not self.hit:
            return "hits nothing"
        if self.both_zero:
            return "both factors zero"
        if self.scaling < SMALL_SCALING:
            return "scaling too small"
        if self.gradient is not None and self.gradient < NO_GRADIENT:
            return "no gradient"
        if self.visible is None:
            return ""
        if self.lr < SMALL_RATE:
            return "rate too small"
        if self.steps < FEW_STEPS:
            return "too few steps"
        return "rate too small" if self.rates < FEW_STEPS * SMALL_RATE else "little to gain"

    @property
    def advice(self) -> str:
        """What happened and what to change, in one sentence; "" where nothing has to be."""
        lower, usual = f"{self.lr / 10:.2g}", f"{USUAL_RATE:g}"
        return {
            "": "",
            "diverged": f"It diverged: the learning rate {self.lr:.2g} is too large; try {lower}.",
            "hits nothing": "The targets hit no matrix of this model; choose others, such as q and v.",
            "both factors zero": "A and B are both zero, so both of their gradients are, and nothing can ever move; "
                                 "begin with a random A.",
            "no gradient": "No gradient reached the adapted matrices: the loss does not depend on them; adapt others.",
            "rate too large": f"It went astray: the learning rate {self.lr:.2g} is too large; try {lower}.",
            "learnt by heart": "It learnt the training rows by heart: their loss fell while the held-out loss rose; "
                               "take fewer steps or more rows.",
            "scaling too small": f"B·A is multiplied by s = {self.scaling:.2g} only; raise α, to {2 * self.rank} say.",
            "rate too small": f"The learning rate {self.lr:.2g} is too small; try {usual}.",
            "too few steps": f"{self.steps} {'step is' if self.steps == 1 else 'steps are'} too few; "
                             f"try {USUAL_STEPS}.",
            "little to gain": "The settings are usual ones: this adapter has little to gain on these rows; "
                              "adapt more matrices, or take other rows.",
        }[self.reason]  # fmt: skip

    def sentence(self, *, score: tuple[str, str, str] | None = None, took: str = "") -> str:
        """What happened, made from the numbers.

        score  (its name, before, after) as texts
        took   how long it took, as a text
        """
        n = f"{self.steps:,} {'step' if self.steps == 1 else 'steps'}"
        n += f" in {took}" if took else ""
        r = self.ratio
        if r is None:
            size = f"‖ΔW‖ is {self.delta:.2g}" if self.delta or not self.hit else "every W0 is as it was"
        elif r < 2:
            size = f"‖ΔW‖ is {percent(r)} of ‖W0‖"
        else:
            size = f"‖ΔW‖ is {r:,.1f} times ‖W0‖" if math.isfinite(r) else "‖ΔW‖ is no finite number"
        what = "most probable word" if self.thing == "token" else "most probable label"
        moved = ""
        if self.changed is not None:
            moved = f", and {percent(self.changed)} of {self.counted:,} held-out {self.thing}s have another {what}"
        told = f" and {score[0]} from {score[1]} to {score[2]}" if score else ""
        before, after = (math.nan if v is None else v for v in (self.loss_before, self.loss_after))
        if self.visible:
            loss = f" took the held-out loss from {before:.2f} to {after:.2f}{told}" if self.gain is not None else ""
            return f"{n}{loss}: {size}{moved}. {self.advice}".strip()
        if self.visible is None:
            return f"{n}: {size}. No rows are held out, so what it does to others was not measured."
        loss = f", held-out loss {before:.2f} before and {after:.2f} after" if self.gain is not None else ""
        return f"No visible effect after {n}{loss}: {size}{moved}. {self.advice}".strip()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the numbers, and ratio, visible, reason and advice that follow from them."""
        return asdict(self) | {n: getattr(self, n) for n in ("ratio", "visible", "reason", "advice")}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Effect:
        """Inverse of `to_dict`, also of one that went through JSON, where what is not finite became None."""
        values: dict[str, Any] = {f.name: d[f.name] for f in fields(cls)}
        values |= {n: math.inf for n in ("delta", "W0", "rates", "scaling") if values[n] is None}
        return cls(**values)


def percent(share: float) -> str:
    """A share as people read it: 61 %, 0.42 %, 0.000013 %."""
    p = 100 * share
    if p == 0 or p >= 10:
        return f"{p:,.0f} %"
    return f"{p:.{max(1, 1 - math.floor(math.log10(p)))}f} %"
