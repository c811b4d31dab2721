"""What the page says when something does not go on: a silent process, a full disk, files that were deleted."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app import cli
from app.pages.lab import Lab
from app.runs.process import HEARTBEAT
from app.runs.queue import RunQueue
from app.runs.run import Run
from app.runs.store import RunStore
from tests.pages_kit import STAND_IN, ask, client, say, trained
from tests.runs_kit import request


def test_a_silent_run_is_told_on_the_page_and_in_the_list(
    page: TestClient, store: RunStore, capsys: pytest.CaptureFixture[str]
) -> None:
    run = store.claim(store.create(request()).id)
    assert run is not None
    assert ask(page, "run", run=run.id)["says"] == f"run {run.id} is training: step 0 of 20"
    (run.folder / HEARTBEAT).write_text(f"{time.monotonic() - 45:020.3f}")
    says = ask(page, "run", run=run.id)["says"]
    assert says.startswith(f"run {run.id} has given no sign of life for 4") and says.endswith("after 5 min it is ended")
    assert cli.run(["runs", "list"]) == 0
    assert "running, silent for 4" in capsys.readouterr().out
    store.finish(run.id, "stopped")


def test_a_queue_that_cannot_begin_says_why(store: RunStore) -> None:
    queue = RunQueue(store, command=STAND_IN)
    with client(store, queue=queue) as page:
        queue.close()  # its thread, so that nothing is begun meanwhile
        run = store.create(request(), queue=True)
        queue.warned = "the disk has 3 MB left; runs begin once it has 17"
        says = ask(page, "run", run=run.id)["says"]
        assert "waits for its turn" in says and says.endswith(queue.warned)
        store.ask_to_stop(run.id)


def test_an_adapter_or_a_whole_run_deleted_under_the_server(page: TestClient, store: RunStore, model: str) -> None:
    run = trained(store, model)
    assert run.adapter is not None
    assert ask(page, "heat", run=run.id).get("error") is None
    shutil.rmtree(run.adapter)
    for answer in (say(page, "cut", run=run.id, setting={"by": "rank", "value": 1}), ask(page, "heat", run=run.id),
                   ask(page, "compare", run=run.id), ask(page, "dials", run=run.id)):  # fmt: skip
        told = answer.get("error") or ""
        assert "did not work" not in told and "Traceback" not in told, answer
    shutil.rmtree(run.folder)
    view = ask(page, "run", run=run.id)
    assert view["status"] == "done" and view["rows"] is not None
    assert "the folder of run" not in str(ask(page, "runs").get("error"))
    store.delete(run.id)
    assert "no run" in ask(page, "run", run=run.id)["error"]


def test_a_model_deleted_under_the_server(lab: Lab, store: RunStore, model: str, run: Run, tmp_path: Path) -> None:
    lab.session.load(model)
    shutil.move(model, tmp_path / "away")
    try:
        assert lab.session.facts(model)["layers"] == 2, "what is loaded goes on"
        with lab.session.model(model) as loaded:
            assert loaded.model is not None
        failed = trained(store, model)
        assert failed.status == "failed" and failed.error and "no model folder" in failed.error
    finally:
        shutil.move(tmp_path / "away", model)
    assert trained(store, model).status == "done"
