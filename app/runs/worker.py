"""Trains one run: `python -m app.runs.worker RUN_FOLDER`, or `run_here` in the process that asks for it.

The order in which the end of a run is written makes a kill harmless at every point: the adapter under another name,
then renamed, then the event "end", then the line in the store.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import apsw

from app.runs import events as event_files
from app.runs.folder import ADAPTER, log, save_adapter, sentence, tidy, trim
from app.runs.process import STOP, Heartbeat, Lock, Signs, be_modest
from app.runs.run import Run, Status, command_line
from app.runs.session import OpenSession, Session, open_session
from app.runs.spare import WAIT, wait
from app.runs.store import RunStore
from lora_core.errors import UserError
from lora_core.home import writing

NOTE_S = 0.5  # between two notes of the step in the store; the events have every step
SCORE_S, STOPPED_SCORE_S = 60.0, 15.0  # a score that takes longer is left out; Compare can still make one
TOGETHER = "together.json"  # in a run's folder: the runs that one process trains with it
NOT_MINE = 3  # exit status of a worker whose run somebody else has, or nobody wants any more
Event = dict[str, Any]


def run_here(store: RunStore, run_id: int, on_event: Callable[[Event], None] | None = None, *, resume: bool = True,
             session: OpenSession = open_session) -> Run:  # fmt: skip
    """Train a run in this process, from its last checkpoint if it has one; gives the run as it then stands.

    A file `stop` in the run's folder ends it as "stopped"; SIGINT or SIGTERM (in the main thread) as "interrupted",
    both after the current step and with the adapter kept. A second SIGINT does not wait for the step. Whatever goes
    wrong is in the run's `error`, its traceback in log.txt. Raises UserError only when the run cannot be begun.

    resume   False: only a run that waits in the queue, not one that ended meanwhile
    session  what is trained; tests have one without a model
    """
    with claimed(store, run_id, resume) as (run, kept, remark), noted_signals() as signals:
        signs = Signs()
        with Heartbeat(run.folder, signs):
            Training(store, run, kept, on_event, signals, signs, remark).go(session)
    return store.get(run_id)


@contextmanager
def claimed(store: RunStore, run_id: int, resume: bool = True) -> Iterator[tuple[Run, list[Event], str | None]]:
    """Make a run this process's own for the block: (the run, the events that stay, what to remark of them).

    Raises UserError when it cannot be begun: it has ended, or is somebody else's.
    """
    run = store.get(run_id)
    store.may_start(run)
    if not resume and run.status != "queued":
        raise UserError(f"run {run_id} is {run.status} and waits for nobody")
    lock = Lock(run.folder)
    if not lock.take():
        raise UserError(f"run {run_id} is being trained by another process")
    try:
        with writing(run.folder):
            (run.folder / STOP).unlink(missing_ok=True)
            tidy(run.folder)
            kept, remark = trim(run.folder)
        mine = store.claim(run_id, resume=resume)
        if mine is None:
            raise UserError(f"run {run_id} is not to be trained any more")
        yield mine, kept, remark
    finally:
        lock.release()


class Signals:
    """What the system or the keyboard asked for."""

    def __init__(self) -> None:
        self.asked = False


@contextmanager
def noted_signals() -> Iterator[Signals]:
    """SIGINT and SIGTERM are noted; a second SIGINT raises KeyboardInterrupt. Only the main thread may set handlers."""
    signals = Signals()

    def note(number: int, frame: object) -> None:
        if signals.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        signals.asked = True

    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for n, handler in before.items():
            signal.signal(n, handler if handler is not None else signal.SIG_DFL)


class Training:
    """One attempt at a run."""

    def __init__(self, store: RunStore, run: Run, kept: list[Event], on_event: Callable[[Event], None] | None,
                 signals: Signals, signs: Signs, remark: str | None = None) -> None:  # fmt: skip
        self.store, self.run, self.kept, self.on_event, self.signals = store, run, kept, on_event, signals
        self.signs, self.remark = signs, remark
        self.began, self.noted = time.monotonic(), 0.0
        self.every = int(run.request.config.get("checkpoint_every", 0)) or 10
        self.offset_s = max((e.get("seconds", 0.0) for e in kept), default=0.0)
        self.start = max((e.get("step", 0) for e in kept), default=0)
        self.writer: event_files.EventWriter | None = None
        self.session: Session | None = None
        self.values: Event = {}  # what the store gets to know: step, steps, base_loss, loss
        self.effect: Event | None = None
        self.last: Event = {}
        self.saved = False

    def go(self, session: OpenSession) -> None:
        """Train and write down how it ended; never raises but for SystemExit when even that cannot be written."""
        status: Status
        try:
            self.writer = event_files.EventWriter(self.run.folder / event_files.NAME)
            status, error = self._train(session)
        except KeyboardInterrupt:
            status, error = self._interrupted()
        except BaseException as e:
            log(self.run.folder, traceback.format_exc())
            status, error = "failed", sentence(e, self.run.folder)
        self.finish(status, error)

    def _train(self, session: OpenSession) -> tuple[Status, str | None]:
        self._status("loading", f"loading {self.run.request.model}")
        self.signs.patient = True  # a model may have to be fetched first
        self.session = session(self.run.request, self.run.folder)
        self.signs.seen()
        self.signs.patient = False
        self._status("training", self.remark or self.usual)
        for event in self.session.train(self.stop_asked):
            self.take(event)
        return self.conclude()

    @property
    def usual(self) -> str:
        """How the training begins, where there is nothing else to remark."""
        return "continuing from the last checkpoint" if self.kept else "scoring the base model"

    def take(self, event: Event) -> None:
        """Write down one event of the training; with "end" the adapter is saved first."""
        event["seconds"] = round(event.get("seconds", 0.0) + self.offset_s, 3)
        if event["kind"] == "base" and any(e["kind"] == "base" for e in self.kept):
            if event.get("message"):  # another processor or another version than before
                self._status("training", event["message"])
            return  # a resumed run says again what the base was
        self._note(event)
        if event["kind"] == "end":
            self.last = event
            self._save()
        self._append(event)

    def conclude(self) -> tuple[Status, str | None]:
        """How the run ended, measured where it ended well."""
        end = self.last
        if not end:
            raise RuntimeError("the training ended without its last event")
        if end["reason"] == "diverged":
            self._measure()
            return "diverged", end.get("message")
        if self._stopped_by_signal() and end["reason"] == "stopped":
            return "interrupted", "interrupted from outside"
        self._score(SCORE_S if end["reason"] == "done" else STOPPED_SCORE_S)
        return end["reason"], None

    def _interrupted(self) -> tuple[Status, str | None]:
        """KeyboardInterrupt: keep what there is, in whatever moment it came."""
        with suppress(Exception):
            if self.session is not None and self.values.get("step") and not self.saved:
                self._save()
        return "interrupted", "interrupted from outside"

    def finish(self, status: Status, error: str | None) -> None:
        told = ("train_s", "tokens", "tokens_per_s", "seconds")
        result: Event = {k: self.last[k] for k in told if k in self.last}
        with suppress(Exception):
            result |= self.session.facts() if self.session else {}
        if self.effect is not None:
            result["effect"] = self.effect
        result["wall_s"] = round(time.monotonic() - self.began, 3)
        if self.writer is not None:
            self.writer.sync()
            self.writer.close()
        (self.run.folder / STOP).unlink(missing_ok=True)
        adapter = (self.run.folder / ADAPTER).is_dir()
        try:
            self.store.finish(self.run.id, status, error=error, result=result, adapter=adapter, **self.values)
        except Exception as e:
            log(self.run.folder, traceback.format_exc())
            print(sentence(e, self.run.folder), file=sys.stderr)
            raise SystemExit(1) from None

    # ---- pieces
    def stop_asked(self) -> bool:
        self.signs.seen()
        asked = self.signals.asked or (self.run.folder / STOP).exists()
        if asked:
            self.sync()  # as before every checkpoint
        return asked

    def sync(self) -> None:
        """The events so far are on the disk afterwards."""
        if self.writer is not None:
            self.writer.sync()

    def _stopped_by_signal(self) -> bool:
        return self.signals.asked and not (self.run.folder / STOP).exists()

    def _append(self, event: Event) -> None:
        assert self.writer is not None
        self.signs.seen()
        self.writer.append(event)
        if event["kind"] in ("step", "held") and event["step"] % self.every == 0:
            self.writer.sync()  # a checkpoint may be written next: the disk is to have the curve up to it
        if self.on_event is not None:
            self.on_event(event)

    def _status(self, stage: str, message: str) -> None:
        step = self.values.get("step", self.start)
        self._append({"kind": "status", "stage": stage, "message": message, "step": step})

    def _note(self, event: Event) -> None:
        held = event.get("held_loss")
        self.values |= {k: event[k] for k in ("step", "steps") if k in event}
        if held is not None:
            self.values["loss"] = held
            if event["kind"] == "base":
                self.values["base_loss"] = held
        if event["kind"] == "end" or held is not None or time.monotonic() - self.noted > NOTE_S:
            self.noted = time.monotonic()
            with suppress(apsw.FullError, apsw.IOError):  # a full disk is told by the events' file
                self.store.progress(self.run.id, **self.values)

    def _save(self) -> None:
        session, request = self.session, self.run.request
        assert session is not None
        info = {
            "run": self.run.id,
            "model": request.model,
            "task": request.data_name,
            "spec": request.spec,
            "config": request.config,
            "command": command_line(request.shareable()),
            "base_loss": self.values.get("base_loss", self.run.base_loss),
            "loss": self.values.get("loss"),
            "step": self.values.get("step"),
            "steps": self.values.get("steps"),
            **session.facts(),
        }
        save_adapter(self.run.folder, lambda folder: session.save(folder, event_files.plain(info)))
        self.saved = True

    def _measure(self) -> None:
        """What the training did to the model; like the score it may be missing."""
        assert self.session is not None
        try:
            self.effect = self.session.effect(self.store.events(self.run.id), self.stop_asked)
        except Exception:
            log(self.run.folder, traceback.format_exc())

    def _score(self, most_s: float) -> None:
        """A score of both models on a few held-out rows, unless that takes too long or somebody wants to stop."""
        assert self.session is not None
        (self.run.folder / STOP).unlink(missing_ok=True)  # asked and done; a second one is meant for this
        self._status("scoring", "scoring some held-out examples with and without the adapter")
        self._measure()
        until, cut = time.monotonic() + most_s, ""

        def stop() -> bool:
            nonlocal cut
            cut = "it was stopped" if self.stop_asked() else "it took too long" if time.monotonic() > until else cut
            return bool(cut)

        try:
            score = self.session.score(stop)
        except Exception:  # the adapter is trained and kept; a missing score does not make the run a failure
            log(self.run.folder, traceback.format_exc())
            score, cut = None, "it failed; log.txt in the run's folder says why"
        if score is None and cut:
            self._status("unscored", f"the score was left out: {cut}")
        if score is not None:
            self.values["score"] = score
            self._append({"kind": "score", **score})


def main(arguments: list[str], session: OpenSession = open_session, open_sweep: Any = None) -> int:
    """The worker process; a list of others in the run's folder means that they are trained with it.

    Exit status 0: the store says how the run ended; 3: the run was not to be trained here.
    """
    if waits := arguments == [WAIT]:
        be_modest()
        if (given := wait()) is None:
            return 0
        arguments = [given]
    if len(arguments) != 1 or not Path(arguments[0]).name.isdigit():
        print("usage: python -m app.runs.worker RUN_FOLDER", file=sys.stderr)
        return 2
    folder = Path(arguments[0]).absolute()
    if not waits:
        be_modest()
    store = RunStore(folder.parent.parent)
    try:
        if (folder / TOGETHER).exists():
            from app.runs import together

            together.train(store, folder, open_sweep)
            return 0
        run_here(store, int(folder.name), resume=False, session=session)
    except UserError as error:
        print(error, file=sys.stderr)
        return NOT_MINE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
