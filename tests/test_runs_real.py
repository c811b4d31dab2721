"""Runs with lora_core's own training on a tiny random model: killed and resumed, on the user's file, recorded."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.pages.along import load
from app.pages.settings import cuts_of
from app.runs.folder import CHECKPOINT
from app.runs.process import identity
from app.runs.queue import RunQueue
from app.runs.record import record
from app.runs.recorded import recorded_texts
from app.runs.run import Run, RunRequest
from app.runs.session import task_of
from app.runs.store import RunStore
from app.runs.worker import run_here
from lora_core.errors import UserError
from lora_core.files import read_adapter
from tests.runs_kit import tiny_model, until

CONFIG: dict[str, Any] = {"batch_size": 4, "lr": 0.02, "seed": 3, "eval_rows": 8, "dtype": "float32", "device": "cpu"}
ROWS = [(f"name {i} | food {f}", f"place {i} serves {f} food") for i, f in enumerate(["Thai", "Greek", "Dutch"] * 20)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunStore]:
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the workers; here it is torch's own setting
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield RunStore(tmp_path)
    torch.set_num_threads(before)


def request(model: str, steps: int, **more: Any) -> RunRequest:
    config = CONFIG | {"steps": steps} | more.pop("config", {})
    return RunRequest(**{"model": model, "task": "pirate", "config": config, "spec": {"rank": 4}} | more)


def factors(run: Run) -> dict[str, np.ndarray]:
    assert run.adapter is not None
    stored = read_adapter(run.adapter)
    return {f"{k}.{n}": getattr(s, n) for k, s in stored.sites.items() for n in ("A", "B")}


def test_a_run_that_was_killed_ends_as_if_it_never_had_been(store: RunStore, model: str) -> None:
    wanted = request(model, 60, config={"checkpoint_every": 5})
    whole = run_here(store, store.create(wanted).id)
    assert whole.status == "done" and whole.loss is not None and whole.base_loss is not None, whole.error
    assert whole.loss < whole.base_loss
    queue = RunQueue(store, tick_s=0.05).boot()
    try:
        run = queue.start(store.create(wanted).id)
        until(lambda: (run.folder / CHECKPOINT).exists())
        pid = store.get(run.id).pid
        assert pid and identity(pid) == store.get(run.id).process
        os.kill(pid, signal.SIGKILL)
        until(lambda: store.get(run.id).status == "interrupted")
        assert (run.folder / CHECKPOINT).exists()
        queue.resume(run.id)
        run = until(lambda: (r := store.get(run.id)) and not r.live and r)
    finally:
        queue.close()
    assert (run.status, run.attempts, run.error) == ("done", 2, None)
    mine, theirs = factors(run), factors(whole)
    assert mine.keys() == theirs.keys() and all(np.array_equal(mine[k], theirs[k]) for k in mine)

    def curve(r: Run) -> list[tuple[Any, ...]]:
        events = [e for e in store.events(r.id) if e["kind"] in ("step", "held")]
        return [(e["kind"], e["step"], e.get("loss"), e.get("held_loss")) for e in events]

    assert curve(run) == curve(whole)
    assert (run.loss, run.base_loss, run.score) == (whole.loss, whole.base_loss, whole.score)
    assert not [p.name for p in run.folder.iterdir() if p.name.startswith(".") or p.name == CHECKPOINT]


def test_without_held_out_rows_nothing_is_measured(store: RunStore, model: str) -> None:
    run = run_here(store, store.create(request(model, 2, config={"eval_rows": 0})).id)
    assert run.status == "done" and run.score is None and not (run.base_loss or run.loss), (run.score, run.base_loss)
    kinds = {e["kind"] for e in store.events(run.id)}
    assert "step" in kinds and not kinds & {"held", "score"}


def test_on_the_users_file_stopped_and_resumed(store: RunStore, model: str, tmp_path: Path) -> None:
    data = tmp_path / "Mina's places.tsv"
    data.write_text("prompt\tcompletion\n" + "".join(f"{p}\t{c}\n" for p, c in ROWS))
    run = store.create(request(model, 24, task=None, data=str(data), config={"checkpoint_every": 4}))
    data.unlink()  # the run has its own copy

    def press(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == 9:
            store.ask_to_stop(run.id)

    run = run_here(store, run.id, press)
    assert (run.status, run.step) == ("stopped", 9), run.error
    assert run.adapter and run.score is not None and run.score["name"] == "BLEU"
    info = read_adapter(run.adapter).info
    assert info["task"] == "Mina's places" and info["template"] == "{prompt} ->" and info["step"] == 9
    assert str(tmp_path) not in json.dumps(info).replace(model, "")  # where the user's file was is nobody's business
    run = run_here(store, run.id)
    assert run.status == "done" and run.step == 24
    assert [e["step"] for e in store.events(run.id) if e["kind"] == "step"] == list(range(1, 25))
    task = task_of(run)
    assert task.source == "Mina's places.tsv" and len(task.train) + len(task.test) == len(ROWS)


def test_a_run_that_diverges(store: RunStore, model: str) -> None:
    import torch

    from app.runs import session

    class Bursts(session._Training):
        """From step 5 on the loss is not a number, as with a learning rate that is much too large."""

        def train(self, stop: session.Stop) -> Any:
            for event in super().train(stop):
                yield event
                if event["kind"] == "step" and event["step"] == 4:
                    with torch.no_grad():
                        next(iter(self.adapter.parameters())).fill_(float("nan"))

    run = run_here(store, store.create(request(model, 20)).id, session=Bursts)
    assert run.status == "diverged" and run.error and "learning rate" in run.error
    assert run.step == 4 and all(np.isfinite(f).all() for f in factors(run).values())


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"model": "/no/such/model"}, "no model folder"),
        ({"task": "resturant"}, "did you mean 'restaurant'"),
        ({"spec": {"targets": ["q_proj"]}}, "did you mean 'q'"),
        ({"spec": {"rank": 33}}, "rank"),
        ({"config": {"steps": 0}}, "steps is 0"),
    ],
)
def test_what_the_user_gave_wrong_fails_the_run_with_its_own_line(
    store: RunStore, model: str, wrong: dict[str, Any], said: str
) -> None:
    run = run_here(store, store.create(request(**{"model": model, "steps": 3} | wrong)).id)
    assert run.status == "failed" and run.error and said in run.error and "\n" not in run.error


def test_a_finished_run_is_recorded_and_read_back(store: RunStore, model: str, tmp_path: Path) -> None:
    where = tmp_path / "recorded"
    assert RunStore(tmp_path, recorded=where).recorded() is None
    run = run_here(store, store.create(request(model, 12)).id)
    record(store, run.id, where, examples=2)
    record(store, run.id, where, examples=2)  # again, over the first
    names = ["adapter", "events.jsonl", "held.json", "run.json", "texts.json"]
    assert sorted(p.name for p in where.iterdir()) == names
    reader = RunStore(tmp_path, recorded=where)
    back = reader.get(0)
    held = load(back, cuts_of(back))  # the losses along the dials are there at once
    held.wanted = True
    assert held.complete and held.holders is not None
    by_k = held.families["k"].values()
    assert by_k is not None and by_k[0] == pytest.approx(run.base_loss, abs=5e-3)
    assert by_k[-1] == pytest.approx(run.loss, abs=5e-3)
    assert back.recorded and back.id == 0 and back.folder == where and back.adapter == where / "adapter"
    assert (back.status, back.step, back.loss, back.score) == ("done", 12, run.loss, run.score)
    assert back.request == run.request
    assert reader.events(0) == [e for e in store.events(run.id) if e["kind"] != "status"]
    texts = recorded_texts(where)
    assert texts["command"].startswith("lora-lab train --model") and len(texts["examples"]) == 2
    for example in texts["examples"]:
        assert example["prompt"] and example["reference"]
        assert "".join(t["text"] for t in example["tokens"]).strip() == example["adapted"]
        assert all({"base_logprob", "adapted_logprob", "base_top", "adapted_top"} <= set(t) for t in example["tokens"])
    for use in (reader.delete, reader.enqueue):
        with pytest.raises(UserError, match="recorded"):
            use(0)
    assert 0 not in [r.id for r in reader.list()]


def test_only_a_whole_run_is_recorded_and_only_over_a_recording(store: RunStore, model: str, tmp_path: Path) -> None:
    run = store.create(request(model, 2))
    with pytest.raises(UserError, match="queued"):
        record(store, run.id, tmp_path / "r")
    run = run_here(store, run.id)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        record(store, run.id, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
