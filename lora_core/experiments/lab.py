"""Where experiments run: what they share (models, seeds, progress, stopping) and what is kept of them."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from lora_core.experiments.cells import Cells
from lora_core.experiments.experiment import Experiment
from lora_core.home import home

T = TypeVar("T")


class Stopped(Exception):
    """The experiment was asked to stop; the cells that were finished are kept."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far an experiment is: the cell it is in, the share of the work that is done, the seconds left where known."""

    name: str
    cell: str
    done: float
    left_s: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Cell:
    """A piece of work that is kept when it is done. make: gives plain JSON values; work: how much, beside others."""

    key: str
    make: Callable[[], Any]
    work: float = 1.0


def _busy() -> float:
    """Seconds that this process and its children have computed, over all threads."""
    return sum(os.times()[:4])


class Lab:
    """Runs experiments: `run_experiment("rank", Lab(quick=True))`.

    quick    the two-minute version of each experiment
    seeds    what is repeated with, three unless told
    encoder  the model that classification runs on; writer: the one that writes text. A name, a folder or a hub id
    steps    training steps instead of each experiment's own number: a shorter look, or a longer one
    tell     called with a Progress before and within cells; stop: asked there, True raises `Stopped`
    """

    def __init__(self, *, quick: bool = False, seeds: Sequence[int] = (0, 1, 2), encoder: str = "minilm",
                 writer: str = "smollm2-135m", steps: int | None = None, tell: Callable[[Progress], None] | None = None,
                 stop: Callable[[], bool] | None = None) -> None:  # fmt: skip
        self.quick, self.seeds, self.steps_given = quick, tuple(seeds), steps
        self.names = {"encoder": str(encoder), "writer": str(writer)}
        self._tell, self._stop = tell, stop
        self._models: dict[str, tuple[Any, Any]] = {}
        self._kept: dict[str, Any] = {}
        self._share, self._started, self._cell = (0.0, 1.0), 0.0, ""
        self._pace: float | None = None
        self.used: set[str] = set()
        self.experiment: Experiment | None = None
        self.cells: Cells | None = None

    # ---- what experiments ask for
    def choose(self, quick: T, full: T) -> T:
        """The first in the quick version, else the second."""
        return quick if self.quick else full

    def steps(self, quick: int, full: int) -> int:
        """Training steps."""
        return self.steps_given or self.choose(quick, full)

    def encoder(self) -> tuple[Any, Any]:
        """(model with a head for the sentiment task, tokenizer), loaded once, in float32."""
        return self._load("encoder", labels=("negative", "positive"))

    def writer(self) -> tuple[Any, Any]:
        """(causal language model, tokenizer), loaded once, in float32."""
        return self._load("writer")

    def _load(self, which: str, **more: Any) -> tuple[Any, Any]:
        from lora_core.models import load_model

        self.use(which)
        if which not in self._models:
            self._models[which] = load_model(self.names[which], dtype="float32", **more)
        return self._models[which]

    def keep(self, key: str, make: Callable[[], T]) -> T:
        """What cells share in memory, such as a decomposition of all weights: made at its first use."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def use(self, which: str) -> str:
        """The name of the encoder or writer, noted as used."""
        self.used.add(which)
        return self.names[which]

    def run(self, cells: Sequence[Cell]) -> dict[str, Any]:
        """{key: value} of all cells: those of an earlier sitting as they were, the others made now, one by one."""
        assert self.cells is not None, "an experiment runs inside run_experiment"
        known = self.cells
        todo = [c for c in cells if c.key not in known.values]
        total = sum(c.work for c in cells)
        done, spent, worked = total - sum(c.work for c in todo), 0.0, 0.0
        for c in todo:
            self._cell, self._share = c.key, (done / total, c.work / total)
            self._pace = spent / worked * total if worked else None
            self._started, busy = time.perf_counter(), _busy()
            self.at(0.0)
            value = c.make()
            took = min(time.perf_counter() - self._started, _busy() - busy)  # no time asleep
            known.put(c.key, value, took)
            done, spent, worked = done + c.work, spent + took, worked + c.work
        return {c.key: known.values[c.key] for c in cells}

    def at(self, share: float) -> None:
        """Say how much of the present cell is done, from 0 to 1; raises `Stopped` where that was asked for."""
        if self._stop is not None and self._stop():
            raise Stopped(self.experiment.name if self.experiment else "")
        if self._tell is None or self.experiment is None:
            return
        before, size = self._share
        pace = self._pace
        if pace is None and share > 0.02:
            pace = (time.perf_counter() - self._started) / (share * size)
        done = before + size * share
        self._tell(Progress(name=self.experiment.name, cell=self._cell, done=done,
                            left_s=None if pace is None else pace * (1 - done)))  # fmt: skip

    # ---- what `run_experiment` asks for
    def begin(self, experiment: Experiment) -> None:
        """Open what is kept of this experiment with these very settings, code and machine."""
        from lora_core.machine import fingerprint

        code = inspect.getsource(inspect.getmodule(experiment.run) or type(self))
        what = [experiment.name, self.quick, self.seeds, self.names, self.steps_given, fingerprint(), code]
        key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
        self.experiment, self.used, self._kept = experiment, set(), {}
        self.cells = Cells(home() / "experiments" / f"{experiment.name}-{key}.jsonl")
