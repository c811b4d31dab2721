"""Nothing is lost: `python -m tests.kills PART --times N` kills what works on a store, again and again, and looks.

queue  kill -9 of one of two servers, of the worker, or of both, at random moments; with checkpoints of twelve
       megabytes, so that kills fall into writes. What is trained is the stand-in.
cuts   the power goes between any two operations of the disk, one after the other, in a whole training, in making,
       importing and deleting a run; with what no fsync has asked for lost or not.
real   kill -9 at random moments in the library's own training of a tiny model, and cuts in it.

After each: the store opens; every finished run has the same bytes; the one that was killed goes on and ends with the
losses and the adapter of one that never was; nothing half-written stays; no two processes train one run. What is not
so is an AssertionError. The last line printed is a JSON object with the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.runs.process import identity
from app.runs.run import Run
from app.runs.store import RunStore
from tests.kept_whole import Watch, half_written, one_at_a_time
from tests.kills_forked import Figures, power, real
from tests.runs_kit import request, spawn, until

SERVER = """
import sys, time
from app.runs.queue import RunQueue
from app.runs.store import RunStore
RunQueue(RunStore(sys.argv[1]), command=(sys.executable, "-m", "tests.runs_kit"), tick_s=0.05).boot()
time.sleep(3600)
"""
STEPS, SIZE = 40, 12_000_000


# ---- kills of servers and workers
class Killer:
    """Two servers on one store, a run that is always being trained, and what was killed."""

    def __init__(self, home: Path, dice: random.Random) -> None:
        self.home, self.dice, self.trace = home, dice, home / "trace"
        self.config = {"step_s": 0.004, "size": SIZE, "trace": str(self.trace)}
        self.servers = [spawn(SERVER, str(home)) for _ in range(2)]
        self.store = RunStore(home)
        steps: list[tuple[Any, ...]] = [("step", s, 3.0 - 2.0 * s / STEPS, None) for s in range(1, STEPS + 1)]
        self.watch = Watch(home, [*steps, ("held", STEPS, None, 1.0)])
        self.killed, self.inside = Counter[str](), 0
        self.run = self.new()

    def new(self) -> Run:
        return self.store.create(request(steps=STEPS, config=self.config), queue=True)

    @property
    def now(self) -> Run:
        return self.store.get(self.run.id)

    def once(self) -> None:
        """Wait a moment, kill somebody, look."""
        if self.now.status == "done":
            self.run = self.new()
        elif not self.now.live:
            assert self.now.status == "interrupted" and self.now.error, (self.now.status, self.now.error)
            self.store.enqueue(self.run.id)
        until(lambda: self.now.status == "running" or not self.now.live)
        self.wait()
        what = self.dice.choices(("worker", "server", "both"), (7, 2, 1))[0]
        worker = self.kill_worker() if what != "server" else None
        if what != "worker":
            self.kill_server(self.dice.randrange(2))
        self.watch.look()
        if worker is not None:
            until(lambda: self.now.status != "running" or self.now.pid != worker)

    def wait(self) -> None:
        """Any moment, or, every other time, one in which something is being written."""
        time.sleep(self.dice.uniform(0, 0.8))
        end = time.monotonic() + (1.0 if self.dice.random() < 0.5 else 0.0)
        while time.monotonic() < end and self.now.live and not list(self.run.folder.glob(".*")):
            time.sleep(0.001)

    def kill_worker(self) -> int | None:
        now = self.now
        if now.status != "running" or not now.pid or identity(now.pid) != now.process:
            return None
        os.kill(now.pid, signal.SIGSTOP)  # where it stands now it will be killed
        self.inside += bool(list(now.folder.glob(".*")))
        os.kill(now.pid, signal.SIGKILL)
        self.killed["worker"] += 1
        return now.pid

    def kill_server(self, which: int) -> None:
        self.servers[which].kill()
        self.servers[which].communicate()
        self.servers[which] = spawn(SERVER, str(self.home))
        self.killed["server"] += 1

    def finish(self) -> None:
        """Let the last run come to its end."""
        until(lambda: not self.now.live, 120)
        if self.now.status != "done":
            self.store.enqueue(self.run.id)
            until(lambda: self.now.status == "done", 120)
        self.watch.look()
        assert not (left := half_written(self.store.root)), left

    def close(self) -> None:
        for server in self.servers:
            server.kill()
            server.communicate()
        for run in self.store.list(status=("running",)):
            if run.pid and identity(run.pid) == run.process:
                os.kill(run.pid, signal.SIGKILL)


def queue(home: Path, times: int, seconds: float, dice: random.Random) -> Figures:
    """Kill servers and workers until there were `times` kills or the time is over."""
    end, killer = time.monotonic() + seconds, Killer(home, dice)
    try:
        while sum(killer.killed.values()) < times and time.monotonic() < end:
            killer.once()
        killer.finish()
    finally:
        killer.close()
    return {"kills": sum(killer.killed.values()), **killer.killed, "inside_a_save": killer.inside,
            "finished": len(killer.watch.finished), "workers": one_at_a_time(killer.trace)}  # fmt: skip


PARTS: dict[str, Callable[[Path, int, float, random.Random], Figures]] = {"queue": queue, "cuts": power, "real": real}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--times", type=int, default=120, help="kills")
    parser.add_argument("--seconds", type=float, default=220, help="at most so long")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    memory = Path("/dev/shm")  # where fsync costs nothing: what a cut loses is our own doing
    home = Path(tempfile.mkdtemp(prefix="kills-", dir=memory if given.part == "cuts" and memory.is_dir() else None))
    began = time.monotonic()
    try:
        figures = PARTS[given.part](home, given.times, given.seconds, random.Random(given.seed))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    figures |= {"part": given.part, "seed": given.seed, "seconds": round(time.monotonic() - began, 1)}
    print(json.dumps(figures), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
