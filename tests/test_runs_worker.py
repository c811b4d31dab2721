"""One run from its beginning to each of its ends, in this process and with a stand-in for the model."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.runs import worker
from app.runs.folder import CHECKPOINT, save_adapter, tidy
from app.runs.process import STOP, Lock
from app.runs.run import Run
from app.runs.store import RunStore
from app.runs.worker import run_here
from lora_core.errors import UserError
from tests.runs_kit import StandIn, adapter_sum, request, spawn, until


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path)


def train(store: RunStore, id: int, **more: object) -> Run:
    return run_here(store, id, session=StandIn, **more)  # type: ignore[arg-type]


def steps_of(store: RunStore, id: int) -> list[int]:
    return [e["step"] for e in store.events(id) if e["kind"] == "step"]


def total(steps: int) -> int:
    return steps * (steps + 1) // 2


def test_a_whole_run(store: RunStore) -> None:
    seen: list[dict] = []
    run = train(store, store.create(request(steps=12)).id, on_event=seen.append)
    assert (run.status, run.step, run.steps, run.base_loss, run.loss) == ("done", 12, 12, 3.0, 1.0)
    assert run.error is None and run.pid == os.getpid() and run.started and run.ended and run.ended >= run.started
    assert run.score and run.score["adapted"] == {"exact match": 0.5} and run.score["rows"] == 16
    assert {"train_s", "tokens_per_s", "dtype", "device", "trainable", "peak_bytes"} <= set(run.result)
    assert run.adapter == run.folder / "adapter" and adapter_sum(run.folder) == total(12)
    assert store.events(run.id) == seen
    kinds = [e["kind"] for e in seen]
    assert kinds == ["status", "status", "base", *["step"] * 12, "held", "end", "status", "score"]
    left = {p.name for p in run.folder.iterdir()}
    assert left == {"adapter", "events.jsonl", "heartbeat", "lock", "request.json"}
    assert store.heartbeat_age(run.id) is not None


def test_a_stop_keeps_the_adapter_of_the_last_step(store: RunStore) -> None:
    run = store.create(request(steps=50))

    def press(event: dict) -> None:
        if event["kind"] == "step" and event["step"] == 7:
            store.ask_to_stop(run.id)

    run = train(store, run.id, on_event=press)
    assert (run.status, run.step, run.error) == ("stopped", 7, None)
    assert adapter_sum(run.folder) == total(7) and run.score is not None
    assert not (run.folder / STOP).exists()


def test_an_interrupted_run_goes_on_and_its_curve_has_each_step_once(store: RunStore) -> None:
    run = store.create(request(steps=20, config={"step_s": 0.001}))

    def press(event: dict) -> None:
        if event["kind"] == "step" and event["step"] == 13:
            store.ask_to_stop(run.id)

    train(store, run.id, on_event=press)
    assert steps_of(store, run.id) == list(range(1, 14))  # the reader has now seen what will be cut off
    run = train(store, run.id)
    assert (run.status, run.attempts, run.step) == ("done", 2, 20)
    assert steps_of(store, run.id) == list(range(1, 21)) and adapter_sum(run.folder) == total(20)
    events = store.events(run.id)
    assert sum(e["kind"] == "base" for e in events) == 1 and run.base_loss == 3.0
    seconds = [e["seconds"] for e in events if "seconds" in e]
    assert seconds == sorted(seconds)
    assert not (run.folder / CHECKPOINT).exists()


def test_without_a_checkpoint_it_begins_anew(store: RunStore) -> None:
    run = store.create(request(steps=8, config={"press_at": 4}))
    assert train(store, run.id).status == "interrupted"
    assert steps_of(store, run.id) == [1, 2, 3] and adapter_sum(run.folder) == total(3)
    with store.db.transaction():
        store.db.execute("UPDATE runs SET request = replace(request, '\"press_at\": 4', '\"x\": 0')")
    run = train(store, run.id)
    assert run.status == "done" and steps_of(store, run.id) == list(range(1, 9))
    assert adapter_sum(run.folder) == total(8)


def test_a_damaged_checkpoint_is_put_aside(store: RunStore) -> None:
    run = store.create(request(steps=8))
    (run.folder / CHECKPOINT).write_bytes(b"\xff" * 100)
    run = train(store, run.id)
    assert run.status == "done" and adapter_sum(run.folder) == total(8)
    assert (run.folder / f"damaged-{CHECKPOINT}").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_after_the_step_as_interrupted(store: RunStore, number: signal.Signals) -> None:
    run = store.create(request(steps=5000, config={"step_s": 0.01}))
    code = """
import sys
from app.runs.store import RunStore
from app.runs.worker import run_here
from tests.runs_kit import StandIn
run = run_here(RunStore(sys.argv[1]), 1, session=StandIn)
sys.exit(130 if run.status == "interrupted" else 1)
"""
    process = spawn(code, str(store.root.parent))
    until(lambda: store.get(run.id).step > 0)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    run = store.get(run.id)
    assert run.status == "interrupted" and run.error and run.step < 5000
    assert adapter_sum(run.folder) == total(run.step) and steps_of(store, run.id) == list(range(1, run.step + 1))


def test_a_fault_is_one_line_for_people_and_a_traceback_in_the_log(store: RunStore) -> None:
    run = train(store, store.create(request(config={"fail_at": 4})).id)
    assert run.status == "failed" and run.adapter is None
    assert run.error and "the wheel came off of the wagon" in run.error and "\n" not in run.error
    assert "Traceback" not in run.error and "Traceback" in (run.folder / "log.txt").read_text()
    assert steps_of(store, run.id) == [1, 2, 3]


def test_what_the_user_gave_wrong_is_told_as_it_is(store: RunStore) -> None:
    assert train(store, store.create(request(config={"wrong": True})).id).error == "no model 'stand-in'"


class Diverges(StandIn):
    def train(self, stop: object) -> Iterator[dict]:
        yield {"kind": "base", "step": 0, "steps": 9, "held_loss": 3.0}
        yield {"kind": "step", "step": 1, "steps": 9, "loss": 2.0}
        bad = {"held_loss": float("nan"), "reason": "diverged", "message": "too fast"}
        yield {"kind": "end", "step": 1, "steps": 9, **bad}


def test_a_run_that_diverges_keeps_its_points_and_the_last_good_adapter(store: RunStore) -> None:
    run = run_here(store, store.create(request()).id, session=Diverges)
    assert (run.status, run.error, run.step, run.loss) == ("diverged", "too fast", 1, None)
    assert run.adapter is not None and steps_of(store, run.id) == [1]
    with pytest.raises(UserError, match="smaller learning rate"):
        train(store, run.id)


def test_memory_that_ran_out_is_said_so(store: RunStore) -> None:
    class Hungry(StandIn):
        def train(self, stop: object) -> Iterator[dict]:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    error = run_here(store, store.create(request()).id, session=Hungry).error
    assert error and error.startswith("memory ran out")


def test_a_score_that_takes_too_long_is_left_out_and_that_is_told(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(StandIn):
        def score(self, stop: Callable[[], bool]) -> None:
            until(stop)

    monkeypatch.setattr(worker, "SCORE_S", 0.05)
    run = run_here(store, store.create(request(steps=3)).id, session=Slow)
    assert run.status == "done" and run.score is None and run.adapter
    assert store.events(run.id)[-1]["message"] == "the score was left out: it took too long"


def test_a_second_stop_ends_the_scoring(store: RunStore) -> None:
    class Slow(StandIn):
        def score(self, stop: Callable[[], bool]) -> None:
            assert not stop()  # the first one is done with
            store.ask_to_stop(1)
            until(stop)

    def press(event: dict) -> None:
        if event["kind"] == "step" and event["step"] == 3:
            store.ask_to_stop(1)

    run = run_here(store, store.create(request(steps=9)).id, press, session=Slow)
    assert run.status == "stopped" and run.score is None and run.step == 3
    assert "it was stopped" in store.events(1)[-1]["message"]


# ---- who may train it
def test_a_run_that_is_over_or_not_wanted_is_not_trained(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "be_modest", lambda: None)
    done = train(store, store.create(request(steps=1)).id)
    with pytest.raises(UserError, match="ended already"):
        train(store, done.id)
    waiting = store.create(request(), queue=True)
    assert store.ask_to_stop(waiting.id).status == "stopped"
    with pytest.raises(UserError, match="waits for nobody"):
        train(store, waiting.id, resume=False)
    assert worker.main([str(waiting.folder)], session=StandIn) == worker.NOT_MINE
    assert store.get(waiting.id).attempts == 0


def test_two_processes_never_train_one_run(store: RunStore) -> None:
    run = store.create(request())
    code = """
import sys, time; from pathlib import Path; from app.runs.process import Lock
assert Lock(Path(sys.argv[1])).take(); print("taken", flush=True); time.sleep(60)
"""
    holder = spawn(code, str(run.folder))
    assert holder.stdout and holder.stdout.readline() == "taken\n"
    with pytest.raises(UserError, match="another process"):
        train(store, run.id)
    holder.kill()
    holder.communicate()
    assert train(store, run.id).status == "done"


def test_the_lock_is_not_handed_on_to_programs_that_its_holder_starts(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    assert lock.take()
    child = subprocess.Popen(["sleep", "60"], close_fds=False)
    lock.release()
    assert Lock(tmp_path).take(0)
    child.kill()
    child.wait()


# ---- full disks
def test_no_room_for_events_fails_the_run_with_one_clear_line(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real, room = os.write, 600

    def write(fd: int, data: bytes) -> int:
        """Like a disk with 600 bytes left: writes what fits, then nothing."""
        nonlocal room
        fits = min(room, len(data))
        room -= fits
        if fits == 0:
            raise OSError(28, "No space left on device")
        return real(fd, data[:fits])

    run = store.create(request())
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        run = train(store, run.id)
    assert run.status == "failed" and run.error and "the disk is full" in run.error and "\n" not in run.error
    # what was written of the line that did not fit is taken back
    assert store.events(run.id) and (run.folder / "events.jsonl").read_bytes().endswith(b"}\n")
    assert train(store, run.id).status == "done" and steps_of(store, run.id) == list(range(1, 21))


def test_no_room_for_the_adapter_keeps_the_one_that_was_there(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run = store.create(request(steps=20))

    def press(event: dict) -> None:
        if event["kind"] == "step" and event["step"] == 7:
            store.ask_to_stop(run.id)

    train(store, run.id, on_event=press)
    before = adapter_sum(run.folder)

    def full(self: StandIn, folder: Path, info: object) -> None:
        folder.mkdir()
        (folder / "a.json").write_text("{")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(StandIn, "save", full)
        run = train(store, run.id)
    assert run.status == "failed" and run.error and "the disk is full" in run.error
    assert run.adapter is not None and adapter_sum(run.folder) == before == total(7)
    assert not [p for p in run.folder.iterdir() if p.name.startswith(".")]
    run = train(store, run.id)
    assert run.status == "done" and adapter_sum(run.folder) == total(20)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(where)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk can be mounted by root alone")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    store = RunStore(small_disk)
    run = store.create(request(steps=30))

    def fill(event: dict) -> None:
        if event.get("step") == 12:
            with open(small_disk / "filler", "ab", buffering=0) as f:
                while True:
                    try:
                        f.write(b"x" * 4096)
                    except OSError:
                        return

    run = train(store, run.id, on_event=fill)
    assert run.status == "failed" and run.error and "the disk is full" in run.error, run
    assert (small_disk / "filler").stat().st_size > 1_000_000
    with pytest.raises(UserError, match="the disk is full"):
        for _ in range(200):
            store.create(request())
    (small_disk / "filler").unlink()
    run = train(store, run.id)  # once there is room again it goes on, without a restart
    assert run.status == "done" and adapter_sum(run.folder) == total(30)
    assert steps_of(store, run.id) == list(range(1, 31))


# ---- names that change hands
@pytest.mark.parametrize("moment", ["written", "old away", "new there"])
def test_a_kill_between_two_renames_leaves_an_adapter(tmp_path: Path, moment: str) -> None:
    def put(name: str, text: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(text)

    put(".adapter.new" if moment != "new there" else "adapter", "new")
    put("adapter" if moment == "written" else ".adapter.old", "old")
    tidy(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert (tmp_path / "adapter" / "a").read_text() == ("new" if moment == "new there" else "old")
    save_adapter(tmp_path, lambda folder: (folder.mkdir(), (folder / "a").write_text("newest")))
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_the_old_adapter_comes_back_when_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(tmp_path, lambda folder: (folder.mkdir(), (folder / "a").write_text("old")))
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if source.name == ".adapter.new":
            raise OSError(28, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "rename", rename)
        save_adapter(tmp_path, lambda folder: (folder.mkdir(), (folder / "a").write_text("new")))
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"] and (tmp_path / "adapter" / "a").read_text() == "old"


def test_the_worker_takes_nothing_but_a_runs_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert worker.main([]) == worker.main(["x", "y"]) == worker.main([str(tmp_path / "no-run")]) == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize("told", [None, {"delta": 1.0}, RuntimeError("no such row")])
def test_what_a_run_did_is_kept_with_its_result(store: RunStore, told: object) -> None:
    class Measured(StandIn):
        def effect(self, events: Any, stop: Callable[[], bool]) -> Any:
            assert [e["kind"] for e in events if e["kind"] != "status"] == ["base", "step", "step", "held", "end"]
            if isinstance(told, Exception):
                raise told
            return told

    run = run_here(store, store.create(request(steps=2)).id, session=Measured)
    assert run.status == "done" and run.result.get("effect") == (told if isinstance(told, dict) else None)
