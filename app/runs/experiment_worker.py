"""Runs one experiment: `python -m app.runs.experiment_worker HOME NAME [--quick]`.

It says how it stands in HOME/experiments/live/NAME.json, twice a second at most. Asked to stop it ends after the
present step, or after some seconds where a step takes longer; finished cells are on the disk, the next attempt goes on.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from app.runs.experiments import live_folder
from app.runs.process import Lock, be_modest, identity
from lora_core.errors import UserError
from lora_core.home import write_json

NOTE_S, LOOK_S, GRACE_S = 0.4, 0.2, 6.0
OTHER = 3  # exit status where another process has the lock


class Attempt:
    """One attempt at an experiment, and what is written down of it."""

    def __init__(self, home: Path, name: str, quick: bool) -> None:
        self.home, self.name, self.quick = home, name, quick
        self.folder = live_folder(home)
        self.asked, self.over, self.writing = threading.Event(), threading.Event(), threading.Lock()
        self.noted = 0.0
        pid = os.getpid()
        self.state: dict[str, Any] = {"quick": quick, "cell": "starting", "done": 0.0, "left_s": None, "error": None,
                                      "pid": pid, "process": identity(pid)}  # fmt: skip

    def say(self, status: str, **more: Any) -> None:
        with self.writing:
            if self.over.is_set():
                return
            self.state |= {"status": status, **more}
            if status in ("stopped", "done", "failed"):
                self.over.set()
            self.noted = time.monotonic()
            write_json(self.folder / f"{self.name}.json", self.state)

    def tell(self, p: Any) -> None:
        if time.monotonic() - self.noted >= NOTE_S or p.cell != self.state["cell"]:
            self.say("running", cell=p.cell, done=p.done, left_s=p.left_s)

    def stopping(self) -> bool:
        return self.asked.is_set()

    def look(self) -> None:
        """From a thread: waits for the wish to stop, and ends the process where that takes long."""
        file = self.folder / f"{self.name}.stop"
        while not self.over.wait(LOOK_S):
            if file.exists():
                self.asked.set()
            if self.asked.is_set():
                if not self.over.wait(GRACE_S):
                    self.say("stopped", left_s=None)
                    end_children()
                    os._exit(0)
                return

    def go(self) -> int:
        from lora_core.experiments import Lab, Stopped, run_experiment

        threading.Thread(target=self.look, name="look", daemon=True).start()
        try:
            self.wait_for_runs()
            self.say("running")
            run_experiment(self.name, Lab(quick=self.quick, tell=self.tell, stop=self.stopping))
            self.say("done", done=1.0, left_s=0.0)
        except (Stopped, KeyboardInterrupt):
            self.say("stopped", left_s=None)
        except UserError as error:
            self.say("failed", error=str(error))
        except BaseException as error:
            traceback.print_exc()
            first = (str(error).splitlines() or [""])[0]
            self.say("failed", error=f"{type(error).__name__}: {first}"[:300])
            return 1
        return 0

    def wait_for_runs(self) -> None:
        """Until no run is being trained; none begins while this process has the lock."""
        from app.runs.queue import settle_dead
        from app.runs.store import RunStore
        from lora_core.experiments import Stopped

        store = RunStore(self.home)
        try:
            while living := settle_dead(store):
                self.say("waiting", cell=f"run {living[0].id} is being trained")
                if self.asked.wait(1.0):
                    raise Stopped(self.name)
        finally:
            store.close()


def end_children() -> None:
    """End the processes that this one has started."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()


def main(arguments: list[str]) -> int:
    home, name, *more = arguments
    attempt = Attempt(Path(home), name, "--quick" in more)
    lock = Lock(attempt.folder)
    if not lock.take():
        return OTHER
    be_modest()
    signal.signal(signal.SIGTERM, lambda *_: attempt.asked.set())
    try:
        return attempt.go()
    finally:
        lock.release()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
