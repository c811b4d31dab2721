"""Held-out losses along a run's dials: what is measured, how far it is, and where it is kept. Knows a model, no server.

All ticks of a dial go through the model in one batch, a few rows at a time, so that a curve is there after the first
rows and sharpens. What is known is kept beside the run, under the stamp of its adapter.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.pages.lab import title
from app.pages.settings import STRENGTHS, Cuts, Setting, cuts_of
from app.runs.run import Run
from lora_core.errors import UserError
from lora_core.home import home, read_json, write_json

if TYPE_CHECKING:
    from lora_core.tasks import Task

FILE = "held.json"
MOST_ROWS = 64
SHARE, SHARED_ROWS, POINTS = 0.2, 16, 4  # of the matrices that hold most; rows and points of the way that finds them
POOL_BYTES = 256 << 20  # of adapters that are attached at once


@dataclass
class Family:
    """The ticks of one dial, and the sums of their losses over the rows so far."""

    settings: list[Setting]
    sums: list[float] = field(default_factory=list)
    labelled: int = 0
    rows: int = 0

    def values(self) -> list[float] | None:
        return [s / self.labelled for s in self.sums] if self.labelled else None


@dataclass
class Held:
    """What is known of one run's held-out loss. `holders`: see `lora_core.Holders`; None until somebody asks."""

    run: Run
    cuts: Cuts
    families: dict[str, Family]
    of: int = 0  # rows in all
    asked: float = 0.0
    first: str = "k"
    wanted: bool = False  # whether the matrices that hold most are asked for
    holders: dict[str, Any] | None = None
    progress: float = 0.0
    says: str = ""
    failed: bool = False  # it cannot be measured; `says` has why

    @property
    def complete(self) -> bool:
        return self.failed or bool(self.of) and all(f.rows >= self.of for f in self.families.values()) and not (
            self.wanted and self.holders is None)  # fmt: skip

    def next(self) -> str | None:
        """The dial to go on with: the one in hand, then the others."""
        order = [self.first, *(n for n in self.families if n != self.first)]
        return next((n for n in order if n in self.families and (not self.of or self.families[n].rows < self.of)), None)

    def kept(self) -> dict[str, Any]:
        """As it is kept in a file."""
        families = {n: {"sums": f.sums, "labelled": f.labelled, "rows": f.rows}
                    for n, f in self.families.items() if f.rows}  # fmt: skip
        return {"stamp": self.cuts.stamp, "of": self.of, "families": families, "holders": self.holders}


# ---- measuring
def rows(run: Run, model: Any, tokenizer: Any, task: Task) -> tuple[Any, list[Any]]:
    """(objective, items) of the rows that a run measured its own loss on, in an order without pattern."""
    import lora_core as lc
    from lora_core.evaluate import spread

    if run.result.get("objective") not in (None, "lm"):
        raise UserError(f"{title(run)} did not learn to write; losses along the dials are those of words")
    config = run.request.config
    objective = lc.CausalLM(model, tokenizer, task.template, int(config.get("max_tokens", 256)))
    items = list(objective.encode(spread(task.test, min(MOST_ROWS, int(config.get("eval_rows", MOST_ROWS))))))
    if not items:
        raise UserError(f"{title(run)} has no held-out rows to measure on")
    random.Random(0).shuffle(items)
    return objective, items


def further(
    family: Family, model: Any, name: str, objective: Any, items: Sequence[Any], stop: Callable[[], bool]
) -> None:
    """Losses of all ticks of a dial on the rows that are left, batch by batch, until stop()."""
    import lora_core as lc
    from lora_core.dials import losses_together

    dials = lc.Dials(lc.get_adapter(model, name))
    size = sum(p.numel() * p.element_size() for p in dials.adapter.parameters()) or 1
    together = max(1, POOL_BYTES // size)
    inner = [i for i, s in enumerate(family.settings) if not (s.base or s.whole)]
    made = [dials.attach(family.settings[i].ranks, family.settings[i].strength) for i in inner]
    try:
        of = dict(zip(inner, (m.name for m in made), strict=True))
        names = [None if s.base else of.get(i, name) for i, s in enumerate(family.settings)]
        unique = list(dict.fromkeys(names))
        groups = [unique[i : i + together] for i in range(0, len(unique), together)]
        while family.rows < len(items) and not stop():
            few = items[family.rows : family.rows + batch_rows(items, family.rows, len(unique))]
            sums: dict[str | None, float] = dict.fromkeys(unique, 0.0)
            labelled = 0
            for group in groups:
                labelled = 0
                for _, values, count in losses_together(objective, few, group):
                    labelled += count
                    for n, v in zip(group, values, strict=True):
                        sums[n] += v
            mine = [sums[n] for n in names]
            family.sums = [a + b for a, b in zip(family.sums or [0.0] * len(mine), mine, strict=True)]
            family.labelled += labelled
            family.rows += len(few)
    finally:
        for m in made:
            m.detach()


def batch_rows(items: Sequence[Any], begin: int, sides: int) -> int:
    """How many rows fill a batch of so many adapters."""
    from lora_core.dials import TOKENS

    longest, n = 0, 0
    for item in items[begin:]:
        longest = max(longest, len(item))
        if n and longest * (n + 1) * sides > TOKENS:
            break
        n += 1
    return max(1, n)


def find_holders(held: Held, model: Any, name: str, objective: Any, items: Sequence[Any]) -> None:
    """The fifth of the matrices that holds most of the gain."""
    import lora_core as lc

    def tell(share: float) -> None:
        held.progress = share

    dials = lc.Dials(lc.get_adapter(model, name))
    found = lc.holders(dials, objective, items, SHARE, points=POINTS, shared=items[:SHARED_ROWS], tell=tell)
    where = held.cuts.addresses()
    held.holders = {"shares": {where[k]: round(v, 5) for k, v in found.shares.items()},
                    "keys": sorted({where[k] for k in found.keys}), "held": found.held, "base": found.base,
                    "whole": found.whole, "kept": found.kept, "rows": len(items), "points": POINTS,
                    "shared": min(SHARED_ROWS, len(items))}  # fmt: skip


def all_of_it(run: Run, model: Any, name: str, tokenizer: Any, task: Task) -> Held:
    """Everything at once, for a run whose adapter `name` is on the model: goes on with what is kept beside it.

    Raises UserError for a run that did not learn to write, or that has nothing held out.
    """
    held = load(run, cuts_of(run))
    objective, items = rows(run, model, tokenizer, task)
    held.of = len(items)
    for family in held.families.values():
        further(family, model, name, objective, items, lambda: False)
    if held.holders is None and not held.cuts.dora:  # DoRA's matrices cannot be switched off
        find_holders(held, model, name, objective, items)
    return held


# ---- kept beside the run
def path_of(run: Run) -> Path:
    return home() / f"recorded-{FILE}" if run.recorded else run.folder / FILE


def load(run: Run, cuts: Cuts) -> Held:
    """A run's losses as they were kept, or nothing measured yet."""
    families = {n: [Setting(ranks=t.ranks) for t in ticks] for n, ticks in cuts.ticks.items()}
    for ticks in families.values():
        ticks[-1] = Setting()
    settings = {"k": families["k"], "mb": families["mb"], "energy": families["energy"]}
    if not cuts.dora:
        settings["strength"] = [Setting(strength=s) for s in STRENGTHS]
    held = Held(run=run, cuts=cuts, families={n: Family(s) for n, s in settings.items() if s})
    for path in dict.fromkeys((run.folder / FILE, path_of(run))):  # what ships, and what was measured here beyond it
        with suppress(UserError, OSError):
            kept = read_json(path)
            if isinstance(kept, Mapping) and kept.get("stamp") == cuts.stamp:
                held.of, held.holders = kept["of"], held.holders or kept.get("holders")
                for n, family in held.families.items():
                    got = kept["families"].get(n)
                    if got and len(got["sums"]) == len(family.settings) and got["rows"] > family.rows:
                        family.sums, family.labelled, family.rows = got["sums"], got["labelled"], got["rows"]
    return held


def save(held: Held) -> None:
    with suppress(OSError, UserError):
        write_json(path_of(held.run), held.kept())
