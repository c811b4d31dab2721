"""A training that does not fit into the memory is refused before anything is loaded: page, command line and queue."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

import lora_core as lc
from app import cli
from app.runs import fits
from app.runs.fits import check_memory, free_memory, step_tokens
from app.runs.run import Run
from app.runs.store import RunStore
from lora_core.errors import UserError
from lora_core.models import empty_model
from tests.pages_kit import SMALL, ask, say, trained

WORDS = "and 0.1 MB are free; take"


def test_the_page_says_so_before_there_is_a_run(
    page: TestClient, store: RunStore, run: Run, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(page, "model", name=model)
    body = {"model": model, "spec": {"targets": ["q"]}, "config": SMALL, "data": {"task": "sentiment"}}
    before = store.count()
    with monkeypatch.context() as patch:
        patch.setattr(fits, "free_memory", lambda: 100_000)
        answer = say(page, "train", **body)
    assert WORDS in answer["error"] and answer["field"] == "" and store.count() == before
    answer = say(page, "train", **body)
    assert answer["run"] and store.count() == before + 1
    say(page, "stop", run=answer["run"])


def test_a_run_that_waited_says_so_when_its_turn_comes(
    store: RunStore, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("nothing is to be loaded")

    monkeypatch.setattr(fits, "free_memory", lambda: 100_000)
    monkeypatch.setattr(lc, "load_model", load)
    made = trained(store, model)
    assert made.status == "failed" and made.error and WORDS in made.error


def test_the_command_says_so_unless_it_is_told_to_try(
    home: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fits, "free_memory", lambda: 100_000)
    words = ["train", "--model", model, "--task", "sentiment", "--steps", "1", "--eval-rows", "0", "--targets", "q"]
    runs = RunStore(home).count()
    assert cli.run(words) == 2
    err = capsys.readouterr().err
    assert WORDS in err and "--anyway" in err and "Traceback" not in err and RunStore(home).count() == runs
    assert cli.run([*words, "--anyway"]) == 0


def test_what_is_needed_is_the_budget_and_what_is_free_is_a_containers_share(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, spec, config = empty_model(model), lc.LoraSpec(targets=("q",)), lc.TrainConfig(batch_size=64, device="cpu")
    task = lc.load_task("sentiment")
    tokens = step_tokens(task, config)
    need = lc.budget(shapes, spec, tokens=tokens).train_bytes
    monkeypatch.setattr(fits, "free_memory", lambda: need)
    check_memory(shapes, spec, config, tokens)
    monkeypatch.setattr(fits, "free_memory", lambda: need - 1)
    with pytest.raises(UserError, match="a smaller batch or shorter rows"):
        check_memory(shapes, spec, config, tokens)
    monkeypatch.undo()
    longer = lc.TrainConfig(batch_size=128)
    assert 1.9 < step_tokens(task, longer) / tokens < 2.1 and step_tokens(task, lc.TrainConfig(max_tokens=2)) <= 16
    everything = free_memory()
    assert everything > 10**8
    monkeypatch.setattr(fits, "CGROUP", tmp_path)
    assert free_memory() > 10**8  # without a container
    for name, text in (
        ("memory.max", "5000000\n"),
        ("memory.current", "4000000\n"),
        ("memory.stat", "inactive_file 7\n"),
    ):
        (tmp_path / name).write_text(text)
    assert free_memory() == 1_000_007
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > 10**8
