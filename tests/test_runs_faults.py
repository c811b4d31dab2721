"""What may happen to a server and its runs, and the word and the way on that there are for each."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.runs import process as process_module
from app.runs import queue as queue_module
from app.runs.process import HEARTBEAT, Heartbeat, Signs, heartbeat_age, identity, last_beat
from app.runs.queue import RunQueue, settle_dead
from app.runs.run import Run
from app.runs.store import RunStore
from app.runs.worker import run_here
from lora_core.errors import UserError
from tests.runs_kit import STAND_IN, StandIn, adapter_sum, request, until

SLOW = {"step_s": 0.02}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    store = RunStore(tmp_path)
    yield store
    for run in store.list(status=("running",)):  # a test that failed leaves no process behind
        if run.pid and run.pid != os.getpid() and identity(run.pid) == run.process:
            os.kill(run.pid, signal.SIGKILL)


@pytest.fixture
def queue(store: RunStore) -> Iterator[RunQueue]:
    queue = RunQueue(store, command=STAND_IN, tick_s=0.05).boot()
    yield queue
    queue.close()


def ended(store: RunStore, id: int) -> Run:
    return until(lambda: (run := store.get(id)) and not run.live and run)


# ---- memory, hanging
def test_a_worker_that_the_system_ends_for_memory(
    store: RunStore, queue: RunQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = iter([3, *[4] * 100])  # the system's count of such ends: before the worker, and after it
    monkeypatch.setattr(queue_module, "oom_kills", lambda: next(kills))
    first = queue.start(store.create(request(steps=20, config={"die_at": 8})).id)
    second = queue.start(store.create(request(steps=3)).id)
    run = ended(store, first.id)
    assert run.status == "failed" and run.error and "memory ran out" in run.error and "smaller" in run.error
    assert [e["step"] for e in store.events(run.id) if e["kind"] == "step"] == list(range(1, 8))
    assert ended(store, second.id).status == "done", "the server goes on"
    queue.start(run.id)
    run = ended(store, run.id)
    assert run.status == "done" and adapter_sum(run.folder) == 210, "from its last checkpoint"


def test_a_worker_that_hangs_is_shown_and_ended(
    store: RunStore, queue: RunQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = queue.start(store.create(request(steps=20, config={"hang_at": 8})).id)
    until(lambda: len(store.events(run.id)) >= 10)
    pid = store.get(run.id).pid
    assert pid
    monkeypatch.setattr(queue_module, "HANG_S", 3.0)
    time.sleep(3.5)
    assert store.get(run.id).status == "running", "its heart beats: a step may take its time"
    os.kill(pid, signal.SIGSTOP)  # stopped by a person, who will let it go on
    time.sleep(3.5)
    assert identity(pid) and store.get(run.id).status == "running"
    monkeypatch.setattr(queue_module, "suspended", lambda pid: False)
    now = ended(store, run.id)
    assert now.status == "interrupted" and now.error and "no sign of life" in now.error
    queue.start(run.id)
    assert ended(store, run.id).status == "done" and adapter_sum(now.folder) == 210


def test_the_heart_stops_when_the_training_thread_is_long_overdue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    signs = Signs(lambda: now)
    for _ in range(3):
        now += 60.0  # steps of a minute
        signs.seen()
    now += 1100.0
    assert not signs.quiet, "twenty such steps may pass"
    now += 200.0
    assert signs.quiet
    signs.patient = True  # a model is fetched
    assert not signs.quiet
    signs.patient = False
    monkeypatch.setattr(process_module, "BEAT_S", 0.01)
    with Heartbeat(tmp_path, signs):
        time.sleep(0.1)
        assert last_beat(tmp_path) is None
        signs.seen()
        first = until(lambda: last_beat(tmp_path))
        until(lambda: (last_beat(tmp_path) or 0) > first)


# ---- clocks
def test_a_clock_that_is_set_hurts_nobody(store: RunStore, queue: RunQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    run = queue.start(store.create(request(steps=60, config=SLOW)).id)
    until(lambda: store.get(run.id).step > 1)
    waiting = [queue.start(store.create(request(steps=2)).id).id]
    for hours in (-1000, 1000, -2000):
        monkeypatch.setattr(time, "time", lambda hours=hours: real() + 3600 * hours)
        waiting.append(queue.start(store.create(request(steps=2)).id).id)
        age = store.heartbeat_age(run.id)
        assert age is not None and age < 30
        time.sleep(0.2)
        assert store.get(run.id).status == "running"
    assert [r.id for r in store.waiting()] == waiting, "nobody overtakes"
    assert ended(store, run.id).status == "done"
    done = [ended(store, id) for id in waiting]
    assert all(r.status == "done" and 0 <= r.result["wall_s"] < 60 for r in done)


def test_a_heartbeat_of_before_the_machine_was_started_says_nothing(tmp_path: Path) -> None:
    (tmp_path / HEARTBEAT).write_text(f"{time.monotonic() + 1000:020.3f}")
    assert heartbeat_age(tmp_path) is None
    for text in ("", "yesterday"):  # of an earlier version, or half of it
        (tmp_path / HEARTBEAT).write_text(text)
        assert heartbeat_age(tmp_path) is None


# ---- folders that go
def test_a_run_whose_folder_was_deleted_is_told_and_the_queue_goes_on(store: RunStore, queue: RunQueue) -> None:
    gone, waiting = (store.create(request(steps=60, config=SLOW)) for _ in range(2))
    queue.start(gone.id)
    until(lambda: store.get(gone.id).step > 1)
    queue.start(waiting.id)
    last = queue.start(store.create(request(steps=3)).id)
    shutil.rmtree(waiting.folder)
    shutil.rmtree(gone.folder)
    for run in (gone, waiting):
        now = ended(store, run.id)
        assert now.status == "failed" and now.error and "is gone" in now.error and now.adapter is None, now
        with pytest.raises(UserError, match="the folder of run .* is gone"):
            queue.start(run.id)
        with pytest.raises(UserError, match="is gone"):
            run_here(store, run.id, session=StandIn)
    assert ended(store, last.id).status == "done"
    store.delete(gone.id)
    assert [r.id for r in store.list()] == [last.id, waiting.id]


def test_the_whole_store_deleted_under_the_server(store: RunStore, queue: RunQueue) -> None:
    run = queue.start(store.create(request(steps=500, config=SLOW)).id)
    until(lambda: store.get(run.id).step > 1)
    pid = store.get(run.id).pid
    assert pid
    shutil.rmtree(store.root.parent)
    assert store.list() == []
    with pytest.raises(UserError, match="no run '1'"):
        store.get(1)
    until(lambda: identity(pid) is None)  # its run is no more: the worker ends by itself
    again = queue.start(store.create(request(steps=3)).id)
    assert ended(store, again.id).status == "done" and (store.root / "queue.lock").exists()
    assert RunStore(store.root.parent).get(again.id).status == "done", "others see the same store"


def test_a_store_put_back_under_the_server_is_the_one_that_counts(store: RunStore, tmp_path: Path) -> None:
    run = run_here(store, store.create(request(steps=3, title="kept")).id, session=StandIn)
    store.db.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copytree(tmp_path / "runs", tmp_path / "copy")
    store.delete(run.id)
    shutil.rmtree(tmp_path / "runs")
    shutil.move(tmp_path / "copy", tmp_path / "runs")
    assert [r.request.title for r in store.list()] == ["kept"] and adapter_sum(store.get(1).folder) == 6


# ---- disks
@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(where)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk can be mounted by root alone")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def fill(disk: Path) -> None:
    with open(disk / "filler", "ab", buffering=0) as f:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    f.write(b"x" * size)
            except OSError:
                pass


def test_a_full_disk_under_the_server(disk: Path) -> None:
    store = RunStore(disk)
    queue = RunQueue(store, command=STAND_IN, tick_s=0.05).boot()
    try:
        run = queue.start(store.create(request(steps=200, config={"size": 100_000, **SLOW})).id)
        later = store.create(request(steps=3))
        until(lambda: store.get(run.id).step > 6)
        fill(disk)
        now = ended(store, run.id)
        assert now.status == "failed" and now.error and "disk is full" in now.error and "resume" in now.error
        assert settle_dead(store) == [] and [r.id for r in store.list()] == [later.id, run.id], "it can be looked at"
        (disk / "filler").unlink()
        (disk / "filler").write_bytes(b"x" * (12 << 20))  # room to write down a wish, too little for a run
        queue.start(run.id)
        until(lambda: "MB left" in queue.warned)
        assert store.get(run.id).status == "queued"
        (disk / "filler").unlink()
        now = ended(store, run.id)  # without a restart, from its checkpoint
        assert now.status == "done" and adapter_sum(now.folder) == 200 * 201 // 2 and now.attempts == 2
        assert not queue.warned and not list(store.root.glob("*/.*"))
    finally:
        queue.close()
        store.close()


def test_a_run_that_dies_on_a_full_disk_is_settled_with_the_ballast(disk: Path) -> None:
    store = RunStore(disk)
    run = store.create(request())
    store.claim(run.id)
    with store.db.transaction():
        store.db.execute("UPDATE runs SET process = 'gone'")
    fill(disk)
    settle_dead(store)
    assert store.get(run.id).status == "interrupted"
    with pytest.raises(UserError, match="disk is full"):
        for _ in range(500):
            store.create(request(title="x" * 200))
    (disk / "filler").unlink()
    assert run_here(store, run.id, session=StandIn).status == "done"
    store.close()


# ---- the stream of events, cut anywhere
def test_a_curve_that_is_read_while_its_file_is_cut_and_goes_on(store: RunStore) -> None:
    run = run_here(store, store.create(request(steps=20)).id, session=StandIn)
    path = run.folder / "events.jsonl"
    whole, events = path.read_bytes(), store.events(run.id)
    follow: Callable[[], list[dict]] = lambda: RunStore(store.root.parent).events(run.id)  # noqa: E731
    for end in range(0, len(whole), 97):
        path.write_bytes(whole[:end])
        assert follow() == events[: whole[:end].count(b"\n")]
    path.write_bytes(whole[:1000] + b"\0" * 50 + b"\n" + whole[1000:])  # a block that never reached the disk
    assert all(e in events for e in follow()) and len(follow()) >= len(events) - 2
    path.write_bytes(whole)
    assert follow() == events and json.loads(whole.splitlines()[0])["kind"] == "status"
