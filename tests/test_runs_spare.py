"""A worker that waits with all imported: it trains the next run, and ends with the server, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.runs import spare as spare_module
from app.runs.process import identity
from app.runs.queue import CODE, RunQueue
from app.runs.spare import Spare
from app.runs.store import RunStore
from tests.runs_kit import STAND_IN, request, until

SERVER = """
import sys, time
from app.runs import spare
from app.runs.queue import CODE, RunQueue
from app.runs.store import RunStore
spare.REST_S = 0.0
queue = RunQueue(RunStore(sys.argv[1]), tick_s=0.05).boot()
while queue.spare.process is None:
    time.sleep(0.05)
print(queue.spare.process.pid, flush=True)
time.sleep(120)
"""


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunQueue]:
    monkeypatch.setattr(spare_module, "REST_S", 0.0)
    made = RunQueue(RunStore(tmp_path), command=STAND_IN, tick_s=0.05)
    made.spare = Spare(STAND_IN, CODE)
    yield made.boot()
    made.close()


def waiting(queue: RunQueue) -> int:
    """Its process number."""
    assert queue.spare is not None
    spare = queue.spare
    until(lambda: spare.process is not None, 30)
    assert spare.process is not None and spare.process.poll() is None
    return spare.process.pid


def test_it_trains_the_next_run_and_another_one_waits_after_it(queue: RunQueue) -> None:
    for _ in range(2):
        pid = waiting(queue)
        id = queue.store.create(request()).id
        queue.start(id)
        until(lambda: not queue.store.get(id).live, 60)  # noqa: B023
        run = queue.store.get(id)
        assert run.status == "done" and run.adapter is not None and run.attempts == 1
        # Its own process, as far as the store still knows it; its words are in the run's log.
        assert run.pid in (None, pid) and (run.folder / "log.txt").exists()


def test_one_that_died_is_missed_by_nobody(queue: RunQueue) -> None:
    os.kill(waiting(queue), signal.SIGKILL)  # the very moment before it is given a run, perhaps
    id = queue.store.create(request()).id
    queue.start(id)
    until(lambda: not queue.store.get(id).live, 60)
    assert queue.store.get(id).status == "done"


def test_there_is_none_where_memory_is_short(queue: RunQueue, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(spare_module, "free_memory", lambda: 1 << 30)
    spare = Spare(STAND_IN, CODE)
    spare.look(True, lambda: dict(os.environ))
    assert spare.process is None


def test_it_ends_with_the_server(queue: RunQueue) -> None:
    pid = waiting(queue)
    queue.close()
    assert identity(pid) is None


def test_it_ends_when_the_server_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVER, str(tmp_path)]
    server = subprocess.Popen(command, cwd=CODE, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    pid = int(server.stdout.readline())
    assert identity(pid) is not None
    server.kill()
    server.wait()
    until(lambda: identity(pid) is None, 60)
