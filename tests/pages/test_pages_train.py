"""Train's further parts without a browser: the film, the walk, what differs between runs, and the Pareto front."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app import figures_train
from app.pages import overlay
from app.pages.lab import Lab
from app.runs.run import Run, RunRequest
from app.runs.store import RunStore
from lora_core.effect import Effect
from lora_core.registry import book_of
from tests.pages_kit import ask, say, trained


# ---- what happened
def test_the_view_says_what_the_run_did(page: TestClient, run: Run) -> None:
    view = ask(page, "run", run=run.id)
    found = Effect.from_dict(run.result["effect"])
    assert found.loss_after == run.loss and found.counted > 0 and found.hit == 4 and found.steps == 6
    assert "‖ΔW‖ is" in view["sentence"] and found.advice in view["sentence"] and "6 steps in " in view["sentence"]


@pytest.mark.parametrize(("lr", "words"), [(1e-9, "The learning rate 1e-09 is too small; try 0.001."),
                                           (1e5, "is too large; try 1e+04.")])  # fmt: skip
def test_a_run_that_was_broken_on_purpose_names_the_reason(lab: Lab, model: str, lr: float, words: str) -> None:
    from app.pages import train

    spec = {"alpha": 1e38} if lr > 1 else {}
    made = trained(lab.store, model, spec=spec, config={"lr": lr, "schedule": "constant", "steps": 4})
    sentence = train.view(lab, {"run": str(made.id)})["sentence"]
    assert words in sentence and sentence.startswith("No visible effect"), sentence  # the first step is the last finite


# ---- the film
def test_the_film_of_the_chosen_matrix(page: TestClient, run: Run, store: RunStore) -> None:
    pictures = [e["sigma"] for e in store.events(run.id) if e.get("sigma")]
    film = ask(page, "film", run=run.id, m="layers.1.v")
    key = "model.layers.1.self_attn.v_proj"
    assert film["m"] == "layers.1.v" and film["title"] == "layer 1, v (value)" and film["path"] == key
    assert film["steps"][0] == 0 and film["steps"][-1] == 6 and film["sigma"][0] == [0.0] * 4
    assert film["sigma"][-1] == pictures[-1][key]
    lines = film["figure"]["data"][:4]
    assert [d["y"] for d in lines] == [[s[i] for s in film["sigma"]] for i in range(4)]
    most = max(pictures[-1], key=lambda k: pictures[-1][k][0])
    for frozen in ("layers.1.k", "", "nonsense"):  # then the one that grew most
        assert ask(page, "film", run=run.id, m=frozen)["path"] == most


def test_a_run_without_pictures_has_no_film(page: TestClient, store: RunStore) -> None:
    waiting = store.create(RunRequest(model="m", task="pirate"))
    asked = ask(page, "film", run=waiting.id)
    assert asked["steps"] == [] and "the first picture comes with the first step" in asked["say"]
    store.delete(waiting.id)
    other = store.create(RunRequest(model="m", task="pirate", spec={"dora": True}))
    assert "Spectra has it after" in ask(page, "film", run=other.id)["say"]
    store.delete(other.id)
    assert "no run" in ask(page, "film", run=999)["error"]


# ---- the walk
def test_a_walk_is_the_run_step_by_step_and_leaves_nothing(lab: Lab, page: TestClient, run: Run) -> None:
    losses = {e["step"]: e["loss"] for e in lab.store.events(run.id) if e["kind"] == "step"}
    asked: dict[str, Any] = {"page": "a", "run": run.id, "m": "layers.0.q"}
    for step in (1, 2):
        read = say(page, "walk", stage="forward", step=step, **asked)["forward"]
        assert read["loss"] == pytest.approx(losses[step], rel=2e-2)  # a 16-bit model adds up in another order
        assert f"{losses[step]:.2f} at this step" in read["beside"] and read["texts"]
        made = say(page, "walk", stage="finish", step=step, **asked)
        assert made["loss"] == pytest.approx(losses[step], rel=1e-4)
        assert made["m"] == "layers.0.q" and made["steps"] == 6 and len(made["delta"]["after"]) == 4
        assert (made["gradient"]["A"] == 0) == (step == 1) and made["gradient"]["B"] > 0 and made["adam"]["B"] > 0
        assert ("B is 0" in made["gradient"]["say"]) == (step == 1)
        assert made["delta"]["norms"][1] > 0 and set(made["gradient"]["map"]) == {"q", "v"}
    assert "begin again with step 1" in say(page, "walk", stage="finish", step=2, **asked)["error"]
    assert say(page, "walk-end", page="a")["ended"] and not say(page, "walk-end", page="a")["ended"]
    assert "begin again" in say(page, "walk", stage="finish", step=3, **asked)["error"]


def test_a_walk_of_the_form_and_wrong_questions(lab: Lab, model: str, run: Run) -> None:
    from app.pages.walk import walk

    form: dict[str, Any] = {"page": "b", "model": model, "spec": {"targets": ["down"], "rank": 2},
                            "config": {"steps": 1, "batch_size": 2}, "data": {"task": "sentiment"}}  # fmt: skip
    assert walk(lab, {**form, "stage": "forward", "step": 1})["forward"]["beside"] == ""
    made = walk(lab, {**form, "stage": "finish", "step": 1, "m": "layers.0.q"})
    assert made["m"].endswith(".down"), "q is not adapted: the one that moved most is shown"
    assert lab.session.loaded is not None and "walk" not in book_of(lab.session.loaded.model).adapters
    for body, words in (({"stage": "sideways"}, "stages forward and finish"),
                        ({"stage": "forward", "run": 999}, "no run"),
                        ({"stage": "forward", "model": model, "config": {"steps": 0}, "data": {"task": "pirate"}},
                         "steps is 0"),
                        ({"stage": "forward", "model": model, "data": {"task": "plain"}}, "by the Train button alone"),
                        ({"stage": "forward", "model": model, "data": {}}, "choose a task")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            walk(lab, {"page": "c", "step": 1, **body})


# ---- what differs, and the front
def test_only_the_settings_that_differ_stand_in_the_table(page: TestClient, lab: Lab, run: Run, model: str) -> None:
    small = trained(lab.store, model, spec={"rank": 1}, config={"steps": 3})
    other = trained(lab.store, model, config={"batch_size": 1})
    table = ask(page, "run", run=run.id, over=f"{small.id},{other.id}")["differs"]
    assert table["names"] == [f"run {r.id}" for r in (run, small, other)]
    rows = {label: values for label, *values in table["rows"]}
    assert rows["r"] == ["4", "1", "4"] and rows["steps"] == ["6", "3", "6"]
    assert rows["batch"] == ["2", "2", "1"] and "seed" not in rows and "matrices" not in rows
    assert rows["held-out loss"] == [f"{r.loss:.2f}" for r in (run, small, other)]
    assert rows["parameters"][0] == f"{run.result['trainable']:,}"
    assert ask(page, "run", run=run.id)["differs"] is None  # what is laid behind by itself has its sentence

    by_size = ask(page, "pareto", run=run.id)
    assert {r[0] for r in by_size["rows"][1:]} >= {f"run {r.id}" for r in (run, small, other)}
    assert by_size["figure"]["data"][0]["line"]["shape"] == "hv" and "on the front" in by_size["say"]
    elsewhere = trained(lab.store, model, task="pirate", config={"steps": 2})
    assert f"run {elsewhere.id}" not in {r[0] for r in by_size["rows"][1:]}
    assert "One run on these rows so far" in ask(page, "pareto", run=elsewhere.id)["say"]


def test_the_front_against_every_pair() -> None:
    import random

    draw = random.Random(3)
    for _ in range(50):
        points: list[dict[str, Any]] = [{"run": i, "trainable": draw.randint(1, 6), "loss": draw.randint(1, 6) / 2}
                                        for i in range(9)]  # fmt: skip

        def beaten(p: Mapping[str, Any], points: list[dict[str, Any]] = points) -> bool:
            return any(q["trainable"] <= p["trainable"] and q["loss"] < p["loss"]
                       or q["trainable"] < p["trainable"] and q["loss"] <= p["loss"] for q in points)  # fmt: skip

        best = {(p["trainable"], p["loss"]) for p in points if not beaten(p)}
        on = [next(p for p in points if p["run"] == r) for r in overlay.front(points)]
        assert {(p["trainable"], p["loss"]) for p in on} == best and len(on) == len(best)
        assert all(a["trainable"] < b["trainable"] and a["loss"] > b["loss"] for a, b in itertools.pairwise(on))


def test_figures_are_figures(tmp_path: Path) -> None:
    import plotly.graph_objects as go

    go.Figure(figures_train.film([0, 1], [[0.0, 0.0], [0.3, 0.1]], last=9))
    go.Figure(figures_train.film([], []))
    point = {"run": 1, "name": "run 1 <b>", "says": "q % v", "trainable": 100, "loss": 2.0}
    made = figures_train.pareto([point], [1], base=3.0, open_=1)
    go.Figure(made)
    assert "<b>" not in made["layout"]["annotations"][0]["text"]
