"""Held-out losses along a run's dials, measured in the background while nothing trains and nobody wants the model.

A question of the page interrupts the measurement at the next layer; it goes on where it was.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from app import figures_compare
from app.pages import along
from app.pages.along import Held, load, save
from app.pages.lab import Lab, task_of_run, title
from app.pages.session import Loaded, ModelSession
from app.pages.settings import STRENGTHS, cuts_of
from app.runs.run import Run
from lora_core.errors import UserError

IDLE_S = 20.0  # since the page last asked
logger = logging.getLogger("lora_lab.page")


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
            along.find_holders(held, loaded.model, name, objective, items)
            save(held)
        family = held.next()
        if family is not None:
            along.further(held.families[family], loaded.model, name, objective, items, stop)
            save(held)


def encoded(lab: Lab, run: Run, loaded: Loaded) -> tuple[Any, list[Any]]:
    """(objective, items) of the rows that a run measured its own loss on, see `along.rows`."""
    with lab.session.words:
        return along.rows(run, loaded.model, loaded.tokenizer, task_of_run(run, loaded.tokenizer))


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
