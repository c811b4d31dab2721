"""Experiments that the page runs: one at a time, each in a process of its own that outlives the server.

What is known of them lies in `home()/experiments/live`: NAME.json is how the last attempt stands, NAME.stop asks it to
stop, log.txt says what went wrong, and a lock is held by the process that works. Runs that wait in the queue begin
after it, and it begins after the run that is being trained: one heavy job at a time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import app
from app.runs.process import LOCK, held, identity
from lora_core.errors import UserError
from lora_core.experiments import NAMES, find_experiment
from lora_core.home import read_json, writing

WORKER = (sys.executable, "-m", "app.runs.experiment_worker")
LIVE = ("waiting", "running", "stopping")
LOG = "log.txt"
State = dict[str, Any]


def live_folder(home: Path) -> Path:
    return home / "experiments" / "live"


def working(home: Path) -> bool:
    """Whether an experiment is being run below that folder, by whichever server's process."""
    return held(live_folder(home), LOCK)


class ExperimentRunner:
    """Starts experiments, stops them, and says how they stand. home: LoRA Lab's folder."""

    def __init__(self, home: Path, *, command: Sequence[str] | None = None) -> None:
        self.home, self.folder, self.command = home, live_folder(home), tuple(command or WORKER)
        self.one = threading.Lock()
        self.child: tuple[str, bool, subprocess.Popen[bytes]] | None = None

    def start(self, name: str, quick: bool) -> State:
        """Begin, or go on where an attempt with the same settings was stopped. UserError while another one runs."""
        find_experiment(name)
        with self.one:
            if busy := next((n for n, s in self.states().items() if s["live"]), None):
                raise UserError(f"{busy!r} is being run here; one experiment at a time")
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / f"{name}.stop").unlink(missing_ok=True)
                with open(self.folder / LOG, "wb") as log:
                    process = subprocess.Popen(
                        [*self.command, str(self.home), name, *(["--quick"] if quick else [])],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        cwd=Path(app.__file__).parent.parent,
                        env={**os.environ, "LORA_LAB_HOME": str(self.home.absolute())},
                        start_new_session=True,  # Ctrl-C in the server's terminal is not meant for it
                    )
            self.child = (name, quick, process)
        return self.state(name) or {}

    def stop(self, name: str) -> State:
        """Ask it to stop; what it has finished is kept. UserError when it is not being run."""
        state = self.state(name)
        if state is None or not state["live"]:
            raise UserError(f"{name!r} is not being run here")
        with writing(self.folder):
            (self.folder / f"{name}.stop").touch()
        return self.state(name) or state

    def states(self) -> dict[str, State]:
        """{name: state} of all that were ever begun here."""
        return {n: s for n in NAMES if (s := self.state(n)) is not None}

    def state(self, name: str) -> State | None:
        """How the last attempt stands: status, quick, cell, done (0 to 1), left_s, error; live: a process works on it.

        status is waiting (for the run that is being trained), running, stopping, stopped, done, failed or interrupted.
        """
        find_experiment(name)
        found = read_json(self.folder / f"{name}.json")
        state: State | None = found if isinstance(found, dict) else None
        child = self.child if self.child and self.child[0] == name else None
        if child is not None and (state is None or state.get("pid") != child[2].pid):
            state = {"quick": child[1], "status": "running", "cell": "starting", "done": 0.0, "left_s": None,
                     "error": None, "pid": child[2].pid, "process": identity(child[2].pid)}  # fmt: skip
        if state is None:
            return None
        code = child[2].poll() if child is not None and state["pid"] == child[2].pid else None
        if state["status"] in LIVE and (code is not None or identity(state["pid"]) != state["process"]):
            failed = code is not None and code > 0
            why = f"its process ended with status {code}; {LOG} in {self.folder} says why" if failed else None
            state = {**state, "status": "failed" if failed else "interrupted", "error": why}
        if state["status"] in LIVE and (self.folder / f"{name}.stop").exists():
            state = {**state, "status": "stopping"}
        told = {k: state.get(k) for k in ("quick", "status", "cell", "done", "left_s", "error")}
        return {"name": name, **told, "live": state["status"] in LIVE}
