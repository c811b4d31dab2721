"""Several runs trained in one process, on one frozen base, in shared batches (see lora_core/sweep.py).

The queue starts the first of them as it starts any run; a list in its folder names the others, which wait for nobody.
Each has its own folder, events, checkpoint, adapter and end, as if it had been trained alone, and after a kill it goes
on from its checkpoint, with the others or by itself.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from app.runs import events as event_files
from app.runs.film import Film
from app.runs.folder import CHECKPOINT, log, sentence
from app.runs.process import Heartbeat, Signs
from app.runs.run import Run, RunRequest
from app.runs.session import LATER, Session, _Training, task_of
from app.runs.store import RunStore
from app.runs.worker import TOGETHER, Training, claimed, noted_signals
from lora_core.errors import UserError
from lora_core.home import write_json

ALIKE = ("steps", "batch_size", "seed", "lr", "accumulate", "max_tokens", "eval_rows", "eval_every", "schedule",
         "warmup", "weight_decay", "clip", "lr_ratio", "beta", "checkpoint_every", "dtype", "device")  # fmt: skip


class Sweep(Protocol):
    """What the worker needs of several trainings at once, by the names of the runs. Tests have one without a model."""

    def train(self, stop: Callable[[], bool], leave: Callable[[str], bool]) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, event); after `leave(name)` says True that one ends, after `stop()` all do."""
        ...

    def part(self, name: str) -> Session:
        """What is saved and measured of one of them."""
        ...


OpenSweep = Callable[[Mapping[str, RunRequest], Mapping[str, Path]], Sweep]  # requests and folders by name


def compatible(a: RunRequest, b: RunRequest) -> bool:
    """Whether two runs see the same rows in the same order at the same rate, so that one batch can serve both."""
    same = (a.model, a.task, a.data, a.template, a.objective) == (b.model, b.task, b.data, b.template, b.objective)
    alike = all(a.config.get(k) == b.config.get(k) for k in ALIKE)
    return same and alike and not a.spec.get("dropout") and not b.spec.get("dropout")


def bind(store: RunStore, runs: Sequence[Run]) -> Run:
    """Note in the first run's folder that the others are trained with it, and put it into the queue."""
    first = runs[0]
    for other in runs[1:]:
        if not compatible(first.request, other.request):
            raise UserError(f"run {other.id} cannot share batches with run {first.id}: its rows or steps differ")
    write_json(first.folder / TOGETHER, [r.id for r in runs])
    return store.enqueue(first.id)


def train(store: RunStore, folder: Path, open_sweep: OpenSweep | None = None) -> None:
    """Train the runs that the list in `folder` names, as far as they still wait. UserError when the first does not."""
    ids = [i for i in json.loads((folder / TOGETHER).read_text(encoding="utf-8")) if isinstance(i, int)]
    with ExitStack() as held:
        signs, signals = Signs(), held.enter_context(noted_signals())
        trainings: dict[str, Training] = {}
        for id in ids:
            try:
                run, kept, remark = held.enter_context(claimed(store, id, resume=False))
            except UserError:
                if id == int(folder.name):
                    raise
                continue  # cancelled meanwhile
            held.enter_context(Heartbeat(run.folder, signs))
            trainings[f"run-{id}"] = Training(store, run, kept, None, signals, signs, remark)
        go(trainings, open_sweep or RealSweep, signs, lambda: signals.asked)


def go(trainings: Mapping[str, Training], open_sweep: OpenSweep, signs: Signs, stop: Callable[[], bool]) -> None:
    """Train all and write down how each ended; the first that is over does not wait for the others to say so."""
    waiting = dict(trainings)

    def stopped() -> bool:
        asked = stop()
        for t in waiting.values() if asked else ():
            t.sync()
        return asked

    try:
        for t in waiting.values():
            t.writer = event_files.EventWriter(t.run.folder / event_files.NAME)
            t._status("loading", f"loading {t.run.request.model}")
        signs.patient = True
        sweep = open_sweep({n: t.run.request for n, t in waiting.items()},
                           {n: t.run.folder for n, t in waiting.items()})  # fmt: skip
        signs.seen()
        signs.patient = False
        for name, t in waiting.items():
            t.session = sweep.part(name)
            together = f"; trained together with {len(waiting) - 1} more" if len(waiting) > 1 else ""
            t._status("training", f"{t.remark or t.usual}{together}")
        for name, event in sweep.train(stopped, lambda name: waiting[name].stop_asked()):
            signs.seen()
            waiting[name].take(event)
        for name in list(waiting):
            status, error = waiting[name].conclude()
            waiting.pop(name).finish(status, error)
    except KeyboardInterrupt:
        for t in waiting.values():
            t.finish(*t._interrupted())
    except BaseException as e:
        for t in waiting.values():
            log(t.run.folder, traceback.format_exc())
            t.finish("failed", sentence(e, t.run.folder))


class RealSweep:
    """lora_core's sweep on lora_core's model."""

    def __init__(self, requests: Mapping[str, RunRequest], folders: Mapping[str, Path]) -> None:
        import importlib

        import lora_core as lc
        from lora_core.objective import choose

        for name in LATER:  # now: an update of LoRA Lab in the midst of a run must not mix two versions of it
            importlib.import_module(name)
        first = next(iter(requests.values()))
        self.config = lc.TrainConfig.from_dict(first.config)
        self.specs = {n: lc.LoraSpec.from_dict(r.spec) for n, r in requests.items()}
        self.model, self.tokenizer = lc.load_model(first.model, device=self.config.device, dtype=self.config.dtype)
        self.task = task_of(first, next(iter(folders.values())), self.tokenizer)
        self.checkpoints = {n: folder / CHECKPOINT for n, folder in folders.items()}
        self.goal = first.objective if first.objective not in (None, "auto") else choose(False, self.task.train)
        self.parts = {n: Part(self, n) for n in requests}

    def part(self, name: str) -> Session:
        return self.parts[name]

    def train(self, stop: Callable[[], bool], leave: Callable[[str], bool]) -> Iterator[tuple[str, dict[str, Any]]]:
        import lora_core as lc
        from lora_core.train import update_norms

        for e in lc.sweep(self.model, self.specs, self.task, self.config, tokenizer=self.tokenizer,
                          objective=self.goal, stop=stop, leave=leave, checkpoints=self.checkpoints):  # fmt: skip
            part, event = self.parts[e.name], e.event.to_dict()
            if e.event.kind == "base":
                part.attached()
            if e.event.kind == "step":
                event["norms"] = update_norms(part.adapter)
            if sigma := part.picture(e.event):
                event["sigma"] = sigma
            yield e.name, event


class Part(_Training):
    """One adapter of a sweep, once it is attached; saved and measured like that of a run of its own."""

    def __init__(self, sweep: RealSweep, name: str) -> None:
        self.sweep, self.name = sweep, name
        self.model, self.tokenizer, self.config = sweep.model, sweep.tokenizer, sweep.config
        self.task = sweep.task

    def attached(self) -> None:
        import lora_core as lc
        from lora_core.objective import objective_for

        self.adapter = lc.get_adapter(self.model, self.name)
        self.objective = objective_for(self.sweep.goal, self.adapter, self.task, self.tokenizer, self.config)
        self.film = Film(self.adapter, self.config.steps)

    def picture(self, event: Any) -> dict[str, list[float]] | None:
        """The spectrum after an event, where the film takes one."""
        if event.kind == "base":
            return self.film.begin(event.train_s)
        if event.kind in ("step", "end"):
            return self.film.after(event.step, event.train_s, end=event.kind == "end")
        return None

    def train(self, stop: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        raise UserError("a part of a sweep is trained with the others")

    def score(self, stop: Callable[[], bool]) -> dict[str, Any] | None:
        """None: writing texts for every adapter would take longer than the training; Compare does it when asked."""
        return None
