"""Questions without a browser: what is told before a guess and after it, figures of all results, running one here."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app import figures_experiments
from app.pages import questions
from app.runs.experiments import ExperimentRunner, live_folder, working
from app.runs.process import Lock
from app.runs.queue import RunQueue
from app.runs.store import RunStore
from lora_core.errors import UserError
from lora_core.experiments import NAMES, Result, find_experiment, results_here, stored_result
from tests.experiment_kit import STAND_IN
from tests.pages_kit import STAND_IN as TRAINER
from tests.pages_kit import ask, say
from tests.runs_kit import request, until

STORED = [n for n in NAMES if stored_result(n)]
ROWS = [{"objective": g, "seed": s, "before": 2.0 + s / 10, "after": 1.0 + s / 20, "steps": 7}
        for g in ("lm", "classify", "preference") for s in range(3)]  # fmt: skip


def result(name: str, rows: list[dict[str, Any]]) -> Result:
    e = find_experiment(name)
    return Result(name=name, question=e.question, claim=e.claim, verdict="undecided", sentence="One.", rows=tuple(rows),
                  quick=True, seconds=3.0, model="tiny", machine={"chip": "a chip", "threads": 2}, command="lora-lab",
                  seeds=(0, 1, 2), made="2026-11-04")  # fmt: skip


# ---- what is told
def test_nothing_is_told_before_a_guess(page: TestClient) -> None:
    found = ask(page, "questions")
    assert [c["name"] for c in found["cards"]] == list(NAMES)
    for card, name in zip(found["cards"], NAMES, strict=True):
        e = find_experiment(name)
        assert set(card) == {"name", "title", "section", "question", "choices"} and card["choices"] == list(e.choices)
        stored = stored_result(name)
        told = json.dumps(card, ensure_ascii=False)
        assert e.claim not in told and (stored is None or stored.sentence not in told)


@pytest.mark.parametrize("name", NAMES)
def test_afterwards_the_claim_and_every_result_are(page: TestClient, name: str) -> None:
    e, stored = find_experiment(name), stored_result(name)
    found = ask(page, "question", name=name)
    assert found["claim"] == e.claim and found["answer"] == e.answer
    words = json.dumps(found["paper"], ensure_ascii=False)
    for key, value in e.paper.items():
        assert key in words
        assert all(str(v) in words for v in (value if isinstance(value, (list, tuple)) else [value]))
    if stored is not None:
        shown = found["results"][0]
        assert shown["where"] == "recorded" and shown["verdict"] == stored.verdict
        assert shown["sentence"] == stored.sentence and shown["command"] == stored.command
        assert dict(shown["facts"])["model"] == stored.model


def test_experiments_that_are_none(page: TestClient) -> None:
    assert "did you mean 'rank'" in ask(page, "question", name="rnak")["error"]
    assert "no experiment" in say(page, "experiment", name="../x", quick=True)["error"]
    assert "true or false" in say(page, "experiment", name="rank", quick="yes")["error"]
    assert "is not being run" in say(page, "experiment-stop", name="rank")["error"]


def test_days_and_times_in_words() -> None:
    assert questions.day("2026-11-04") == "4 Nov 2026" and questions.day("then") == "then"
    assert questions.takes(True, []).startswith("≈") and "40" in questions.takes(False, [None])
    assert questions.takes(True, [result("rank", ROWS)]) == "≈ 3 s"


# ---- figures
@pytest.mark.parametrize("name", STORED)
def test_a_stored_result_has_a_figure_of_its_own(name: str) -> None:
    stored = stored_result(name)
    assert stored is not None and name in figures_experiments.DRAWN
    figure = figures_experiments.DRAWN[name](stored.rows, find_experiment(name).paper)
    assert figure == figures_experiments.figure(stored), "not the plain one"
    check(figure)


def check(figure: dict[str, Any]) -> None:
    import plotly.graph_objects as go

    go.Figure(figure)  # knows every key
    json.dumps(figure, allow_nan=False)
    layout = figure["layout"]
    meta = layout["meta"]
    assert layout["title"]["text"] and meta["say"].endswith(".") and len(meta["table"]) > 1
    assert all(len(row) == len(meta["table"][0]) and all(isinstance(c, str) for c in row) for row in meta["table"])
    for i in range(meta["panels"]):
        n = str(i + 1) if i else ""
        x, y = layout[f"xaxis{n}"], layout[f"yaxis{n}"]
        assert any(t["xaxis"] == f"x{n}" for t in figure["data"])
        assert x["domain"][0] < x["domain"][1] <= 1 + 1e-9 and y["domain"][0] < y["domain"][1] <= 1 + 1e-9
        assert "(log)" in x["title"]["text"] if x.get("type") == "log" else True


def test_means_spread_and_seeds_are_what_was_measured() -> None:
    figure = figures_experiments.figure(result("objective", ROWS))
    check(figure)
    after = next(t for t in figure["data"] if t["name"] == "after")
    assert after["y"] == pytest.approx([1.05] * 3)
    assert after["error_y"]["array"] == pytest.approx([4.303 * 0.05 / 3**0.5] * 3, rel=1e-3)  # Student's, three seeds
    seeds = [t for t in figure["data"] if t["name"] == "each seed"]
    assert sorted(y for t in seeds for y in t["y"]) == sorted(r[c] for r in ROWS for c in ("before", "after"))


def test_the_papers_numbers_stand_beside_ours() -> None:
    rows = [{"task": "sentiment", "rank": r, "seed": s, "base_loss": 0.7, "loss": 0.3, "accuracy": 0.9 + s / 100,
             "stable_rank": 1.0 + r / 20} for r in (1, 8, 64) for s in range(3)]  # fmt: skip
    figure = figures_experiments.figure(result("rank", rows))
    check(figure)
    theirs = next(t for t in figure["data"] if t["name"].startswith("WikiSQL"))
    assert (theirs["x"], theirs["y"]) == ([1, 2, 4, 8, 64], find_experiment("rank").paper["WikiSQL ±0.5"])
    ours = next(t for t in figure["data"] if t["name"] == "sentiment")
    assert ours["x"] == [1, 8, 64] and ours["y"] == pytest.approx([91.0] * 3)


@pytest.mark.parametrize("rows", [
    [{"what": "a", "seed": s, "loss": 1.0 + s} for s in range(3)], [{"n": 3}], [], [{"a": "b"}],
    [{"kind": "cut", "k": 1, "x": None, "y": 0.5}],
])  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_another_version_are_drawn_plainly(name: str, rows: list[dict[str, Any]]) -> None:
    figure = figures_experiments.figure(result(name, rows))
    assert figure["layout"]["meta"]["say"] and isinstance(figure["data"], list)


# ---- running one here
@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ExperimentRunner]:
    monkeypatch.setenv("LORA_LAB_HOME", str(tmp_path))
    monkeypatch.setenv("EXPERIMENT_CELL_S", "0.02")
    runner = ExperimentRunner(tmp_path, command=STAND_IN)
    yield runner
    if runner.child and runner.child[2].poll() is None:
        runner.child[2].kill()
        runner.child[2].wait()


def how(runner: ExperimentRunner) -> str:
    return (runner.state("objective") or {})["status"]


def test_it_is_run_and_its_result_is_there(here: ExperimentRunner) -> None:
    assert here.states() == {}
    begun = here.start("objective", True)
    assert begun["live"] and begun["quick"] and begun["name"] == "objective"
    with pytest.raises(UserError, match="'objective' is being run here"):
        here.start("rank", True)
    until(lambda: how(here) == "done")
    found = results_here("objective")
    assert [(r.quick, r.verdict, len(r.rows)) for r in found] == [(True, "holds", 9)] and found[0].made
    until(lambda: not working(here.home))


def test_stopped_it_goes_on_where_it_was(here: ExperimentRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERIMENT_CELL_S", "0.3")
    here.start("objective", True)
    made = here.home / "made.txt"
    until(lambda: made.exists() and len(made.read_text().splitlines()) >= 2)
    assert (here.state("objective") or {})["done"] > 0
    assert here.stop("objective")["status"] in ("stopping", "stopped")
    until(lambda: how(here) == "stopped")
    assert "goes on from there" in questions.says(here.states()["objective"]) and results_here("objective") == []
    monkeypatch.setenv("EXPERIMENT_CELL_S", "0.01")
    here.start("objective", True)
    until(lambda: how(here) == "done")
    lines = made.read_text().splitlines()
    assert len(lines) == 9 == len(set(lines)), "finished cells are not measured twice"


def test_killed_it_is_interrupted_and_another_server_sees_it(
    here: ExperimentRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERIMENT_CELL_S", "5")
    here.start("objective", True)
    other = ExperimentRunner(here.home, command=STAND_IN)
    until(lambda: (other.state("objective") or {}).get("status") == "running")
    with pytest.raises(UserError, match="one experiment at a time"):
        other.start("objective", False)
    assert here.child is not None
    os.kill(here.child[2].pid, signal.SIGKILL)
    until(lambda: how(here) == "interrupted" and how(other) == "interrupted")
    until(lambda: not working(here.home))


def test_what_goes_wrong_is_one_line(here: ExperimentRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERIMENT_FAILS", "1")
    here.start("objective", True)
    until(lambda: how(here) == "failed")
    assert questions.says(here.states()["objective"]).endswith("RuntimeError: the wheel came off")
    assert "Traceback" in (live_folder(here.home) / "log.txt").read_text()


def test_one_heavy_job_at_a_time(here: ExperimentRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run waits while an experiment works; an experiment waits while a run is trained."""
    store = RunStore(here.home)
    queue = RunQueue(store, command=TRAINER, tick_s=0.05).boot()
    try:
        live_folder(here.home).mkdir(parents=True)
        lock = Lock(live_folder(here.home))
        assert lock.take()
        first = queue.start(store.create(request(steps=30, config={"step_s": 0.05})).id)
        queue.tick()
        assert store.get(first.id).status == "queued"
        lock.release()
        until(lambda: store.get(first.id).status == "running")
        here.start("objective", True)
        until(lambda: how(here) == "waiting")
        assert f"run {first.id} is being trained" in questions.says(here.states()["objective"])
        until(lambda: how(here) == "done")
        assert store.get(first.id).status == "done"
    finally:
        queue.close()
        store.close()
