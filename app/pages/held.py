"""Held-out losses along a run's dials, measured in the background while nothing trains and nobody wants the model.

All ticks of a dial go through the model in one batch, a few rows at a time, so that a curve is there after the first
rows and sharpens. A question of the page interrupts it at the next layer; it goes on where it was. What is complete is
kept beside the run, under the stamp of its adapter.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from app import figures_compare
from app.pages.lab import Lab, task_of_run, title
from app.pages.session import Loaded, ModelSession
from app.pages.settings import STRENGTHS, Cuts, Setting, cuts_of
from app.runs.run import Run
from lora_core.errors import UserError
from lora_core.home import home, read_json, write_json

FILE = "held.json"
MOST_ROWS = 64
SHARE, SHARED_ROWS, POINTS = 0.2, 16, 4  # of the matrices that hold most; rows and points of the way that finds them
POOL_BYTES = 256 << 20  # of adapters that are attached at once
IDLE_S = 20.0  # since the page last asked
logger = logging.getLogger("lora_lab.page")


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


class Bench:
    """Measures for one server, on a thread that lives as long as there is something to measure."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.held: dict[str, Held] = {}
        self.thread: threading.Thread | None = None
        self.lock = threading.Lock()

    def of(self, run: Run) -> Held:
        """What is known of a run; reads what was kept. UserError for one without dials."""
        cuts = cuts_of(run)
        with self.lock:
            key = f"{run.id}.{cuts.stamp}"
            if key not in self.held:
                while len(self.held) >= 8:
                    self.held.pop(next(iter(self.held)))
                self.held[key] = load(run, cuts)
            return self.held[key]

    def wake(self) -> None:
        with self.lock:
            if self.thread is None or not self.thread.is_alive():
                self.thread = threading.Thread(target=self._work, name="held", daemon=True)
                self.thread.start()

    # ---- the thread
    def _work(self) -> None:
        while True:
            now = time.monotonic()
            todo = [h for h in list(self.held.values()) if not h.complete and now - h.asked < IDLE_S]
            if not todo:
                return
            held = max(todo, key=lambda h: h.asked)
            try:
                if not self._step(held):
                    time.sleep(0.2)
            except UserError as error:
                held.says, held.failed = str(error), True
            except Exception:
                logger.exception("held-out losses of %s", title(held.run))
                held.says, held.failed = "the losses could not be measured; the server's log says why", True

    def _step(self, held: Held) -> bool:
        """Measure for as long as nobody else wants the model; whether it was to be had."""
        session = self.lab.session
        if session.training():
            held.says = "waits: a run is being trained"
            return False
        if session.waiting:
            return False
        with session.free_model(held.run.request.model) as loaded:
            if loaded is None:
                held.says = "waits for the model"
                return False
            held.says = "measuring"
            session._share()
            measure(self.lab, held, loaded)
        return True


def measure(lab: Lab, held: Held, loaded: Loaded) -> None:
    """Go on with a run's measurements until the model is wanted."""
    from lora_core.dials import Interrupted, interruptible

    session, folder = lab.session, held.run.adapter
    assert folder is not None
    objective, items = encoded(lab, held.run, loaded)
    held.of = len(items)
    name = session.adapter(loaded, held.run.id, folder)

    def stop() -> bool:
        return bool(session.waiting) or session.training()

    with suppress(Interrupted), interruptible(loaded.model, [name], stop):
        if held.wanted and held.holders is None:
            find_holders(held, loaded, name, objective, items)
            save(held)
        family = held.next()
        if family is not None:
            along(held.families[family], loaded, name, objective, items, stop)
            save(held)


def encoded(lab: Lab, run: Run, loaded: Loaded) -> tuple[Any, list[Any]]:
    """(objective, items) of the rows that a run measured its own loss on, in an order without pattern."""
    import lora_core as lc
    from lora_core.evaluate import spread

    if run.result.get("objective") not in (None, "lm"):
        raise UserError(f"{title(run)} did not learn to write; losses along the dials are those of words")
    config = run.request.config
    with lab.session.words:
        task = task_of_run(run, loaded.tokenizer)
        objective = lc.CausalLM(loaded.model, loaded.tokenizer, task.template, int(config.get("max_tokens", 256)))
        rows = spread(task.test, min(MOST_ROWS, int(config.get("eval_rows", MOST_ROWS))))
        items = list(objective.encode(rows))
    if not items:
        raise UserError(f"{title(run)} has no held-out rows to measure on")
    random.Random(0).shuffle(items)
    return objective, items


def along(family: Family, loaded: Loaded, name: str, objective: Any, items: Sequence[Any], stop: Any) -> None:
    """Losses of all ticks of a dial on the rows that are left, batch by batch, until stop()."""
    import lora_core as lc
    from lora_core.dials import losses_together

    dials = lc.Dials(lc.get_adapter(loaded.model, name))
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


def find_holders(held: Held, loaded: Loaded, name: str, objective: Any, items: Sequence[Any]) -> None:
    import lora_core as lc

    def tell(share: float) -> None:
        held.progress = share

    dials = lc.Dials(lc.get_adapter(loaded.model, name))
    found = lc.holders(dials, objective, items, SHARE, points=POINTS, shared=items[:SHARED_ROWS], tell=tell)
    where = held.cuts.addresses()
    held.holders = {"shares": {where[k]: round(v, 5) for k, v in found.shares.items()},
                    "keys": sorted({where[k] for k in found.keys}), "held": found.held, "base": found.base,
                    "whole": found.whole, "kept": found.kept, "rows": len(items), "points": POINTS,
                    "shared": min(SHARED_ROWS, len(items))}  # fmt: skip


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
    for path in (path_of(run), run.folder / FILE):
        with suppress(UserError, OSError):
            kept = read_json(path)
            if isinstance(kept, Mapping) and kept.get("stamp") == cuts.stamp:
                held.of, held.holders = kept["of"], kept.get("holders")
                for n, family in held.families.items():
                    if (got := kept["families"].get(n)) and len(got["sums"]) == len(family.settings):
                        family.sums, family.labelled, family.rows = got["sums"], got["labelled"], got["rows"]
                break
    return held


def save(held: Held) -> None:
    families = {n: {"sums": f.sums, "labelled": f.labelled, "rows": f.rows} for n, f in held.families.items() if f.rows}
    with suppress(OSError, UserError):
        write_json(path_of(held.run), {"stamp": held.cuts.stamp, "of": held.of, "families": families,
                                       "holders": held.holders})  # fmt: skip


# ---- the page's questions
_benches: WeakKeyDictionary[ModelSession, Bench] = WeakKeyDictionary()
_guard = threading.Lock()


def bench(lab: Lab) -> Bench:
    with _guard:
        if lab.session not in _benches:
            _benches[lab.session] = Bench(lab)
        return _benches[lab.session]


def curve(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """The losses so far, {"k" | "mb" | "energy" | "strength": {"loss": one a tick, "rows"}}, and what is being done.

    query: run; first (the dial in hand); holders ("1": also find the matrices that hold most of the gain)
    """
    run = lab.run(query.get("run"))
    if run.live:
        raise UserError(f"{title(run)} is still training")
    found = bench(lab)
    held = found.of(run)
    held.asked, held.first = time.monotonic(), query.get("first") or held.first
    held.wanted = held.wanted or query.get("holders") == "1"
    if not held.complete:
        found.wake()
    losses = {n: values for n, f in held.families.items() if (values := f.values())}
    base = losses["k"][0] if "k" in losses else None
    figures: dict[str, Any] = {}
    if losses:
        figures["cut"] = figures_compare.along_the_cut(held.cuts.on_page, losses, base, held.cuts.energy)
    if "strength" in losses:
        figures["strength"] = figures_compare.along_the_strength(STRENGTHS, losses["strength"], base)
    return {"run": run.id, "of": held.of, "done": held.complete, "holders": held.holders, "figures": figures,
            "families": {n: {"loss": v, "rows": held.families[n].rows} for n, v in losses.items()},
            "progress": held.progress if held.wanted else None,
            "says": held.says if held.failed else "" if held.complete else held.says or "waits"}  # fmt: skip
