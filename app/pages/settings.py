"""What stands on Compare's dials: which directions of which matrices of a run's ΔW act, and how strongly.

A setting comes from the page as {"by": "k" | "energy" | "mb", "at": which tick of it, "strength", "off": [matrix, …]}.
The ticks of the three dials are cuts by `lora_core.compress`, so that what is shown can be written by it.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from app.pages.lab import title
from app.pages.train import where
from app.runs.run import Run
from lora_core.compress import MB, Plan
from lora_core.errors import UserError, is_real

KEPT = 8  # plans in memory
SHARES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)  # of each matrix's energy, the ticks of that dial
STRENGTHS = tuple(i / 4 for i in range(-4, 9))
_plans: OrderedDict[str, Cuts] = OrderedDict()
_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Tick:
    """One place on a dial: x (k, a share of the energy, or megabytes), what is kept, and what that takes."""

    x: float
    ranks: Mapping[str, int]
    kept: float
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """For the page: x, the share of Σσ² that is kept, bytes of the file, mean, least and most directions."""
        r = list(self.ranks.values())
        return {"x": self.x, "kept": round(self.kept, 5), "bytes": self.bytes, "mean": sum(r) / len(r), "least": min(r),
                "most": max(r)}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """A run's adapter with the ticks of its three dials, {"k" | "energy" | "mb": ticks}, the last of each the whole.

    stamp  of the weights file: what was measured with another one does not count
    """

    plan: Plan
    stamp: str
    ticks: Mapping[str, tuple[Tick, ...]]

    @property
    def dora(self) -> bool:
        return self.plan.least > 0

    @cached_property
    def energy(self) -> list[float]:
        """The share of Σσ² of all matrices that the first k = 0, 1, … directions of each hold; the last is 1."""
        most = self.plan.most
        return [self.plan.energy({key: min(k, n) for key, n in most.items()}) for k in range(max(most.values()) + 1)]

    @cached_property
    def on_page(self) -> dict[str, list[dict[str, Any]]]:
        """The ticks for the page."""
        return {name: [t.to_dict() for t in ticks] for name, ticks in self.ticks.items() if ticks}

    def addresses(self) -> dict[str, str]:
        """{matrix's key: its address on the page, layers.3.v}."""
        return {key: "layers.{}.{}".format(*where(key)) for key in self.plan.most}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where the dials stand. ranks None: all of ΔW. key: the same for the same setting, whatever dial made it."""

    ranks: Mapping[str, int] | None = None
    strength: float = 1.0

    @property
    def whole(self) -> bool:
        return self.ranks is None and self.strength == 1

    @property
    def base(self) -> bool:
        """Whether nothing is left of ΔW: the base model."""
        return self.strength == 0 or self.ranks is not None and not any(self.ranks.values())


def cuts_of(run: Run) -> Cuts:
    """The dials of a run's adapter. Raises UserError when it has none, or nothing that can be cut."""
    from lora_core.files import read_adapter

    if run.adapter is None:
        raise UserError(f"{title(run)} has no adapter to compare with")
    try:
        stamp = hashlib.sha256((run.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()[:16]
    except OSError:
        raise UserError(f"the adapter of {title(run)} is no longer there") from None
    with _lock:
        if stamp not in _plans:
            try:
                plan = Plan(read_adapter(run.adapter))
            except UserError as error:  # it names the folder, which is nobody's business here
                raise UserError(str(error).replace(str(run.adapter), title(run))) from None
            _plans[stamp] = Cuts(plan=plan, stamp=stamp, ticks=_ticks(plan))
            while len(_plans) > KEPT:
                _plans.popitem(last=False)
        _plans.move_to_end(stamp)
        return _plans[stamp]


def _ticks(plan: Plan) -> dict[str, tuple[Tick, ...]]:
    def tick(x: float, ranks: Mapping[str, int]) -> Tick:
        return Tick(x=x, ranks=ranks, kept=plan.energy(ranks), bytes=plan.size(ranks))

    most = max(1, max(plan.most.values()))
    ks = [*range(min(8, most) + 1)]
    while ks[-1] < most:  # all of small ranks; of large ones as many as can be told apart
        ks.append(min(most, max(ks[-1] + 1, math.ceil(ks[-1] * 1.3))))
    by_k = tuple(tick(k, plan.ranks(rank=k) if k >= plan.least else dict.fromkeys(plan.most, 0)) for k in ks)
    by_energy = tuple(tick(e, plan.ranks(energy=e)) for e in SHARES)
    sizes = [by_k[1].bytes / 4, by_k[1].bytes / 2, *(t.bytes for t in by_k[1:])]
    by_mb = []
    for size in sizes:
        try:
            by_mb.append(tick(size / MB, plan.ranks(mb=size / MB)))
        except UserError:  # not even one direction of one matrix fits
            continue
    return {"k": by_k, "energy": by_energy, "mb": tuple(by_mb)}


def setting_of(cuts: Cuts | None, given: Any) -> Setting:
    """What the page sent as a setting; None, or nothing in it: the whole adapter. UserError for what cannot be."""
    if not isinstance(given, Mapping):
        return Setting()
    by, at, strength, off = given.get("by", "k"), given.get("at"), given.get("strength", 1), given.get("off") or []
    if not is_real(strength, -8, 8):
        raise UserError(f"the strength is {strength!r}; it is a number from −8 to 8")
    if not isinstance(off, list) or not all(isinstance(m, str) for m in off):
        raise UserError("what is switched off is a list of matrices, such as layers.12.v")
    if at is None and not off and strength == 1:
        return Setting()
    if cuts is None:
        raise UserError("this adapter has no dials")
    ticks = cuts.ticks.get(str(by), ())
    if at is not None and (isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < len(ticks)):
        raise UserError(f"the dial has {len(ticks)} places; {at!r} is none of them")
    ranks = dict(ticks[at].ranks if at is not None else cuts.plan.most)
    if off:
        known = cuts.addresses()
        if wrong := set(off) - set(known.values()):
            raise UserError(f"'{sorted(wrong)[0][:60]}' is no matrix of this adapter")
        gone = set(off)
        ranks = {key: 0 if known[key] in gone else n for key, n in ranks.items()}
    if cuts.dora and (strength != 1 or off):
        raise UserError("DoRA's magnitudes neither scale nor go with a matrix: here only the rank can be turned")
    whole = all(ranks[key] >= n for key, n in cuts.plan.most.items())
    return Setting(ranks=None if whole else ranks, strength=float(strength))
