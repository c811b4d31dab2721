"""The queue: one worker at a time, each in a process of its own that outlives the server that started it.

The store is the queue's memory. A server that starts finds runs that are being trained and lets them go on, marks
those whose process is dead, and starts what waits. Of several servers on one store one is in charge; when it is gone
another takes over within a moment.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import app
from app.runs.experiments import working
from app.runs.folder import tidy
from app.runs.process import Lock, alive, identity, last_beat, oom_kills, suspended
from app.runs.run import Run, Status
from app.runs.spare import Spare
from app.runs.store import RunStore
from lora_core.errors import UserError
from lora_core.home import home_path

WORKER = (sys.executable, "-m", "app.runs.worker")
CODE = Path(app.__file__).parent.parent  # a worker's folder: the server's own might hold another package `app`
TICK_S = 0.5
HANG_S = 300.0  # without a heartbeat: the worker is ended
ROOM = 16 << 20  # bytes that must be free on the disk before a run begins
FORGOTTEN_S = 3600.0  # a run that was made, but neither queued nor begun for so long: its maker was killed
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
logger = logging.getLogger("lora_lab.queue")


class RunQueue:
    """Starts workers and watches them, from a thread of the server. `boot()` begins, `close()` leaves workers alone."""

    def __init__(self, store: RunStore, *, command: Sequence[str] = WORKER, tick_s: float = TICK_S) -> None:
        self.store, self.command, self.tick_s = store, tuple(command), tick_s
        self.in_charge = Lock(store.root, "queue.lock")
        self.child: tuple[Run, subprocess.Popen[bytes]] | None = None  # the run as it was when it was launched
        self.lent = False  # the child waited before: if it dies before it begins, another one is started
        self.kills = 0
        self.silence: Silence | None = None
        self.wake, self.over = threading.Event(), threading.Event()
        self.thread: threading.Thread | None = None
        self.warned = ""
        self.spare = Spare(command, CODE) if tuple(command) == WORKER else None

    # ---- what the page and the command line ask for
    def start(self, id: int) -> Run:
        """Put a run into the queue: a new one, or one that was interrupted, stopped or failed and is to go on."""
        run = self.store.enqueue(id)
        self.wake.set()
        return run

    resume = start

    def stop(self, id: int) -> Run:
        """Take a waiting run out of the queue, or end a running one after its step, with its adapter kept."""
        run = self.store.ask_to_stop(id)
        self.wake.set()
        return run

    def position(self, id: int) -> int | None:
        """Place in the queue from 1; None for a run that does not wait."""
        return self.store.get(id).position

    # ---- the thread
    def boot(self) -> RunQueue:
        """Find out what became of the runs, then start what waits, now and whenever something is queued."""
        if self.thread is None:
            self.store.sweep()
            self._safe_tick()
            self.thread = threading.Thread(target=self._watch, name="run-queue", daemon=True)
            self.thread.start()
        return self

    def close(self) -> None:
        """End the thread. A worker goes on; the next server finds it."""
        self.over.set()
        self.wake.set()
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.spare is not None:
            self.spare.end()
        self.in_charge.release()

    def _watch(self) -> None:
        while not self.over.is_set():
            self.wake.wait(self.tick_s)
            self.wake.clear()
            if not self.over.is_set():
                self._safe_tick()

    def _safe_tick(self) -> None:
        """A tick that fails, on a full disk for instance, is tried again; it is told once."""
        try:
            self.tick()
            self.warned = ""
        except Exception as error:
            if self.warned != str(error):
                self.warned = str(error)
                logger.warning("the queue waits: %s", error)

    def tick(self) -> None:
        """Look once: who is dead, and whether the next one can start."""
        if not self.in_charge.good:
            self.in_charge.release()
            self.store.root.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
            if not self.in_charge.take(0):
                return
        running = settle_dead(self.store, self._why)
        self._end_what_hangs(running)
        self._reap()
        idle = self.child is None and not running and not working(self.store.root.parent)
        waiting = self.store.waiting() if idle else []
        if self.spare is not None:
            self.spare.look(idle and not waiting, environment)
        if idle:
            for run in waiting[:1]:
                if (free := shutil.disk_usage(self.store.root).free) < ROOM:
                    raise UserError(f"the disk has {free / 1e6:.0f} MB left; runs begin once it has {ROOM / 1e6:.0f}")
                self.store.keep_ballast()
                self._launch(run)

    def _end_what_hangs(self, running: Sequence[Run]) -> None:
        """End a worker that has given no sign of life for `HANG_S`; the next tick says so of its run."""
        if not running:
            self.silence = None
        for run in running[:1]:
            beat = last_beat(run.folder)
            if self.silence is None or (self.silence.run, self.silence.beat) != (run.id, beat):
                self.silence = Silence(run=run.id, beat=beat, last=time.monotonic())
            # Adding up short spans: where this process or the whole machine stood still, nobody hung.
            now = time.monotonic()
            self.silence.seconds += min(now - self.silence.last, 4 * self.tick_s)
            self.silence.last = now
            hangs = beat is not None and self.silence.seconds > HANG_S
            if hangs and run.pid and identity(run.pid) == run.process and not suspended(run.pid):
                logger.warning("run %d gives no sign of life; its process is ended", run.id)
                self.silence.ended = True
                os.kill(run.pid, signal.SIGKILL)

    def _why(self, id: int) -> tuple[Status, str]:
        """How the process of a run ended, asked when it is known to be dead."""
        if self.silence is not None and self.silence.run == id and self.silence.ended:
            return "interrupted", f"it gave no sign of life for {HANG_S / 60:.0f} minutes and was ended"
        code = None
        if self.child is not None and self.child[0].id == id:  # else it was not our own
            with suppress(subprocess.TimeoutExpired):  # it let go of its lock a moment before it ended
                code = self.child[1].wait(1.0)
        return how_it_died(code, self.kills)

    def _reap(self) -> None:
        if self.child is None:
            return
        launched, process = self.child
        code = process.poll()
        if code is None:
            return
        self.child = None
        with suppress(ValueError):  # deleted meanwhile
            run = self.store.get(launched.id)
            same = (run.created, run.attempts) == (launched.created, launched.attempts)
            if run.status == "queued" and same and not self.lent:  # else it began, died and waits again
                why = f"its worker did not start (exit status {code}); log.txt in its folder says why"
                self.store.settle(run, "failed", why)

    def _launch(self, run: Run) -> None:
        self.kills = oom_kills()
        try:
            log = open(run.folder / "log.txt", "ab")
        except FileNotFoundError:
            self.store.settle(run, "failed", f"its folder {run.folder} is gone")
            return
        with log:
            ready = self.spare.give(run.folder) if self.spare is not None else None
            self.lent = ready is not None
            process = ready or subprocess.Popen(
                [*self.command, str(run.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=CODE,
                env=environment(),
                start_new_session=True,  # Ctrl-C in the server's terminal is not meant for it
            )
        self.child = (run, process)


def environment() -> dict[str, str]:
    """What a worker is started with."""
    env = dict(os.environ)
    if env.get("LORA_LAB_HOME"):
        env["LORA_LAB_HOME"] = str(home_path())  # absolute: the worker's folder is another one
    return env


@dataclass
class Silence:
    """How long a run has had the same last heartbeat, in seconds that the queue was there to see."""

    run: int
    beat: float | None
    last: float
    seconds: float = 0.0
    ended: bool = False


def settle_dead(store: RunStore, why: Callable[[int], tuple[Status, str]] | None = None) -> list[Run]:
    """Mark the runs whose process is dead; gives those that are really being trained. Any process may call this.

    why: (status, one line) of a run whose process ended; the caller may have been its parent
    """
    living = []
    for run in store.list(limit=1000, status=("running",)):
        if alive(run.folder, run.pid, run.process):
            living.append(run)
            continue
        status, error = why(run.id) if why else how_it_died(None)
        if store.settle(run, status, error):
            clean(run.folder)
        elif store.get(run.id).status == "running":
            living.append(run)
    for run in store.list(limit=1000, status=("queued",)):
        if run.position is None and time.time() - run.created > FORGOTTEN_S:
            store.settle(run, "interrupted", "it was never begun")
    return living


def clean(folder: Path) -> None:
    """Remove what a dead worker left half-written, unless the run goes on already."""
    lock = Lock(folder)
    with suppress(OSError):
        if lock.take(0):
            tidy(folder)
    lock.release()


def how_it_died(code: int | None, kills: int = 0) -> tuple[Status, str]:
    """(status, one line) for a worker that ended without saying how. Negative codes are signals; None: not known."""
    if code == -signal.SIGKILL:
        if oom_kills() > kills:
            return "failed", "memory ran out; try a smaller batch, shorter rows or a smaller model"
        return "interrupted", "its process was killed (signal 9); often that is because memory ran out"
    if code is not None and -code in CRASHES:
        return "failed", f"its process crashed ({signal.Signals(-code).name}); log.txt in its folder may say more"
    if code is not None and code > 0:
        return "failed", f"its process ended with status {code}; log.txt in its folder says why"
    return "interrupted", "its process ended before the run did: it was killed, or the machine was switched off"
