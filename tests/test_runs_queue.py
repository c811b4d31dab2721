"""The queue and its worker processes: started, stopped, killed, found again by the next server."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.runs import queue as queue_module
from app.runs.process import alive, identity
from app.runs.queue import RunQueue, how_it_died, settle_dead
from app.runs.run import Run
from app.runs.store import RunStore
from lora_core.errors import UserError
from tests.runs_kit import STAND_IN, adapter_sum, request, spawn, until

SLOW = {"step_s": 0.02}
SERVER = """
import sys, time
from app.runs.queue import RunQueue
from app.runs.store import RunStore
queue = RunQueue(RunStore(sys.argv[1]), command=(sys.executable, "-m", "tests.runs_kit"), tick_s=0.05).boot()
print("up", flush=True)
time.sleep(120)
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    store = RunStore(tmp_path)
    yield store
    for run in store.list(status=("running",)):  # a test that failed leaves no process behind
        if run.pid and run.pid != os.getpid() and identity(run.pid) == run.process:
            os.kill(run.pid, signal.SIGKILL)


@pytest.fixture
def new_queue(store: RunStore) -> Iterator[Callable[..., RunQueue]]:
    made: list[RunQueue] = []

    def make(**more: object) -> RunQueue:
        made.append(RunQueue(store, **({"command": STAND_IN, "tick_s": 0.05} | more)))  # type: ignore[arg-type]
        return made[-1].boot()

    yield make
    for queue in made:
        queue.close()


def ended(store: RunStore, id: int) -> Run:
    return until(lambda: (run := store.get(id)) and not run.live and run)


def check_whole(store: RunStore, run: Run) -> None:
    """What must be true of a run at any time, whatever was killed when."""
    text = (run.folder / "events.jsonl").read_bytes() if (run.folder / "events.jsonl").exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    events = [json.loads(line) for line in whole.splitlines()]
    assert store.events(run.id) == events
    steps = [e["step"] for e in events if e["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1))
    if run.adapter is not None:
        n = json.loads((run.adapter / "b.json").read_text())["step"]
        assert adapter_sum(run.folder) == n * (n + 1) // 2


def test_runs_are_trained_one_after_the_other(store: RunStore, new_queue: Callable[..., RunQueue]) -> None:
    queue = new_queue()
    runs = [store.create(request(steps=10, config=SLOW)) for _ in range(3)]
    for run in runs:
        assert queue.start(run.id).status in ("queued", "running")
    until(lambda: store.get(runs[0].id).status == "running")
    assert [queue.position(r.id) for r in runs] == [None, 1, 2]
    done = [ended(store, r.id) for r in runs]
    assert [r.status for r in done] == ["done"] * 3
    assert all((a.ended or 0) <= (b.started or 0) for a, b in zip(done, done[1:]))
    assert all(r.pid != os.getpid() and r.adapter and r.attempts == 1 for r in done)
    with pytest.raises(UserError, match="ended already"):
        queue.start(runs[0].id)


def test_stop_of_a_waiting_and_of_a_running_run(store: RunStore, new_queue: Callable[..., RunQueue]) -> None:
    queue = new_queue()
    first, second = (store.create(request(steps=5000, config=SLOW)) for _ in range(2))
    queue.start(first.id)
    queue.start(second.id)
    until(lambda: store.get(first.id).step > 2)
    assert queue.stop(second.id).status == "stopped"
    queue.stop(first.id)
    run = ended(store, first.id)
    assert run.status == "stopped" and run.adapter and 2 < run.step < 5000
    check_whole(store, run)
    assert store.get(second.id).attempts == 0 and store.get(second.id).adapter is None


def test_a_worker_killed_at_any_moment_leaves_all_whole(store: RunStore, new_queue: Callable[..., RunQueue]) -> None:
    """Kills inside the start, the steps, the checkpoints and the saving of the adapter; then each run goes on."""
    queue = new_queue()
    dice = random.Random(8)
    config = {"step_s": 0.004, "size": 2_000_000}  # 2 MB to write make the moments of writing long enough to be hit
    seen = set()
    run = store.create(request(steps=40, config=config))
    queue.start(run.id)
    for _ in range(5):
        until(lambda id=run.id: (r := store.get(id)).status == "running" or not r.live)
        time.sleep(dice.uniform(0, 0.35))
        now = store.get(run.id)
        if now.status == "running" and now.pid and identity(now.pid) == now.process:
            os.kill(now.pid, signal.SIGKILL)
        now = ended(store, run.id)
        seen.add(now.status)
        check_whole(RunStore(store.root.parent), now)
        if now.status == "done":
            run = store.create(request(steps=40, config=config))
            queue.start(run.id)
        else:
            assert now.status == "interrupted" and now.error and "killed" in now.error
            queue.resume(run.id)
    assert "interrupted" in seen
    last = ended(store, run.id)
    assert last.status == "done" and adapter_sum(last.folder) == 40 * 41 // 2
    check_whole(store, last)
    assert not [p.name for p in last.folder.iterdir() if p.name.startswith(".")]


def test_the_next_server_finds_the_running_run_going_on(store: RunStore, new_queue: Callable[..., RunQueue]) -> None:
    run = store.create(request(steps=200, config=SLOW), queue=True)
    later = store.create(request(steps=3), queue=True)
    server = spawn(SERVER, str(store.root.parent))
    until(lambda: store.get(run.id).step > 3)
    server.kill()
    server.communicate()
    before = store.get(run.id)
    new_queue()
    until(lambda: store.get(run.id).step > before.step + 3)
    now = store.get(run.id)
    assert (now.status, now.pid, now.attempts) == ("running", before.pid, 1)
    assert store.get(later.id).status == "queued"
    store.ask_to_stop(run.id)
    assert ended(store, run.id).status == "stopped"
    assert ended(store, later.id).status == "done"  # and the new server goes on with what waits


def test_ctrl_c_in_the_servers_terminal_does_not_reach_the_worker(store: RunStore) -> None:
    run = store.create(request(steps=60, config=SLOW), queue=True)
    server = spawn(SERVER, str(store.root.parent))
    until(lambda: store.get(run.id).step > 3)
    pid = store.get(run.id).pid
    assert pid and os.getsid(pid) == pid != os.getsid(server.pid)
    assert os.getpriority(os.PRIO_PROCESS, pid) > os.getpriority(os.PRIO_PROCESS, server.pid)  # the page goes first
    server.send_signal(signal.SIGINT)
    server.communicate(timeout=60)
    assert ended(store, run.id).status == "done"


def test_a_run_whose_process_died_while_no_server_was_there(store: RunStore) -> None:
    run = store.create(request(steps=5000, config=SLOW), queue=True)
    server = spawn(SERVER, str(store.root.parent))
    until(lambda: store.get(run.id).step > 0)
    server.kill()
    server.communicate()
    pid = store.get(run.id).pid
    assert pid
    assert [r.id for r in settle_dead(store)] == [run.id]  # alive: nothing is changed
    assert store.get(run.id).status == "running"
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(run.folder, pid, identity(pid)))
    assert settle_dead(store) == []
    now = store.get(run.id)
    assert now.status == "interrupted" and now.error and now.ended
    check_whole(store, now)


def test_a_pid_that_was_reused_is_not_taken_for_the_worker(store: RunStore, new_queue: Callable[..., RunQueue]) -> None:
    run = store.create(request())
    store.claim(run.id)
    stranger = spawn("import time; time.sleep(60)")
    with store.db.transaction():
        store.db.execute("UPDATE runs SET pid = ?, process = 'an earlier one'", (stranger.pid,))
    new_queue()
    assert store.get(run.id).status == "interrupted"
    assert stranger.poll() is None
    stranger.kill()
    stranger.communicate()


def test_a_zombie_is_dead(store: RunStore) -> None:
    process = spawn("print('over')")
    assert process.stdout and process.stdout.read()
    until(lambda: identity(process.pid) is None)  # not yet waited for
    process.communicate()


def test_two_processes_have_two_identities() -> None:
    other = spawn("import time; time.sleep(60)")
    mine, its = identity(os.getpid()), identity(other.pid)
    assert mine and its and mine == identity(os.getpid()) != its
    other.kill()
    other.communicate()
    assert identity(other.pid) is None and identity(2**22 + 1) is None


def test_a_run_that_was_over_but_for_its_line_in_the_store_is_done(store: RunStore) -> None:
    """Killed while it was scored: the adapter is there and the last event was said."""
    run = store.create(request())
    store.claim(run.id)
    (run.folder / "adapter").mkdir()
    (run.folder / "events.jsonl").write_text('{"kind": "end", "step": 20, "steps": 20, "reason": "done"}\n')
    with store.db.transaction():
        store.db.execute("UPDATE runs SET process = 'gone'")
    settle_dead(store)
    assert store.get(run.id).status == "done" and store.get(run.id).adapter


@pytest.mark.parametrize("code, said", [("raise SystemExit(5)", "status 5"), ("import os; os.abort()", "status -6")])
def test_a_worker_that_cannot_start(store: RunStore, new_queue: Callable[..., RunQueue], code: str, said: str) -> None:
    queue = new_queue(command=(sys.executable, "-c", code))
    first, second = store.create(request()), store.create(request())
    queue.start(first.id)
    queue.start(second.id)
    for run in (first, second):  # the queue does not hang on it
        now = ended(store, run.id)
        assert now.status == "failed" and now.error and said in now.error


def test_a_run_resumed_before_its_death_was_looked_at_goes_on(store: RunStore) -> None:
    """Another process marks it, the person resumes it, and then the queue sees how its own child ended."""
    queue = RunQueue(store, command=STAND_IN)
    try:
        queue.start(store.create(request(steps=40, config=SLOW)).id)
        queue.tick()
        run = until(lambda: (r := store.list()[0]).status == "running" and r)
        assert run.pid
        os.kill(run.pid, signal.SIGKILL)
        until(lambda: not settle_dead(store))
        queue.resume(run.id)
        queue.tick()
        assert store.get(run.id).live
        until(lambda: queue.tick() or store.get(run.id).attempts == 2)
        queue.stop(run.id)
        assert ended(store, run.id).status == "stopped"
    finally:
        queue.close()


def test_a_worker_that_ends_without_a_word(store: RunStore, new_queue: Callable[..., RunQueue]) -> None:
    code = """
import os, sys; from pathlib import Path; from app.runs.store import RunStore; from app.runs.process import Lock
folder = Path(sys.argv[1]); lock = Lock(folder); lock.take()
RunStore(folder.parent.parent).claim(int(folder.name)); os._exit(7)
"""
    queue = new_queue(command=(sys.executable, "-c", code))
    run = store.create(request())
    queue.start(run.id)
    now = ended(store, run.id)
    assert now.status == "failed" and now.error and "status 7" in now.error


def test_why_a_process_died(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "oom_kills", lambda: 3)
    assert how_it_died(-9, kills=2)[0] == "failed" and "memory ran out" in how_it_died(-9, kills=2)[1]
    assert how_it_died(-9, kills=3)[0] == "interrupted"
    assert how_it_died(-11) == ("failed", "its process crashed (SIGSEGV); log.txt in its folder may say more")
    assert how_it_died(None)[0] == how_it_died(-15)[0] == "interrupted"


def test_of_two_servers_on_one_store_one_is_in_charge(
    store: RunStore, new_queue: Callable[..., RunQueue], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = spawn(SERVER, str(store.root.parent))
    assert server.stdout and server.stdout.readline() == "up\n"
    second = new_queue()
    launched: list[int] = []
    launch = second._launch
    monkeypatch.setattr(second, "_launch", lambda run: (launched.append(run.id), launch(run)))
    runs = [store.create(request(steps=5, config=SLOW)) for _ in range(3)]
    for run in runs:
        second.start(run.id)  # asked of the one, trained by the other
    done = [ended(store, r.id) for r in runs]
    assert [(r.status, r.attempts) for r in done] == [("done", 1)] * 3 and launched == []
    server.kill()
    server.communicate()
    last = store.create(request(steps=3))
    second.start(last.id)  # and when it is gone the second takes over
    assert ended(store, last.id).status == "done" and launched == [last.id]


def test_a_tick_that_fails_is_tried_again(
    store: RunStore, new_queue: Callable[..., RunQueue], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = new_queue()
    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "waiting", lambda self: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        run = queue.start(store.create(request(steps=2)).id)
        until(lambda: queue.warned)
    assert ended(store, run.id).status == "done" and queue.thread and queue.thread.is_alive()


def test_a_run_that_nobody_began_is_told(store: RunStore) -> None:
    old, new, queued = store.create(request()), store.create(request()), store.create(request(), queue=True)
    with store.db.transaction():
        store.db.execute("UPDATE runs SET created = created - 1e6 WHERE id != ?", (new.id,))
    settle_dead(store)
    assert [store.get(r.id).status for r in (old, new, queued)] == ["interrupted", "queued", "queued"]
