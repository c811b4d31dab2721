"""The rooms without a browser: what they answer, from real runs of a tiny model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.runs.events import NAME, EventWriter
from app.runs.run import Run
from app.runs.store import RunStore
from tests.pages_kit import FILE, ask, say
from tests.runs_kit import until

ROWS = "".join(
    f"colour : {c} | shape : {s}||a {c} {s}\n" for c in ("red", "blue", "green") for s in ("box", "ball", "ring")
)


# ---- adapt
def test_the_form_is_that_of_the_newest_run(page: TestClient, run: Run, model: str) -> None:
    boot = ask(page, "boot")
    assert boot["run"] == run.id and boot["form"]["spec"]["rank"] == 4 and boot["form"]["data"] == {"task": "sentiment"}
    assert boot["facts"]["layers"] == 2 and [m["name"] for m in boot["facts"]["matrices"]][:3] == ["q", "k", "v"]
    assert {t["name"] for t in boot["tasks"]} >= {"restaurant", "json", "pirate"}
    assert "minilm" not in [m["name"] for m in boot["models"]]  # an encoder writes no text


def test_an_unknown_run_in_the_address_is_told(page: TestClient) -> None:
    for text in ("999", "x", "-1", "1e9", "9" * 30):
        boot = ask(page, "boot", run=text)
        assert boot["note"] and boot["form"]["spec"], text


def test_python_confirms_the_budget(page: TestClient, model: str) -> None:
    import lora_core as lc
    from lora_core.models import empty_model

    ask(page, "model", name=model)
    spec = {"targets": ["q", "v"], "rank": 4, "alpha": 8}
    answer = say(page, "budget", seq=7, model=model, spec=spec, config={"batch_size": 2}, tokens=30.0, labelled=5.0)
    expected = lc.budget(empty_model(model), lc.LoraSpec(targets=("q", "v"), rank=4, alpha=8), tokens=60, labelled=10)
    assert answer["seq"] == 7 and answer["budget"] == json.loads(json.dumps(expected.to_dict()))


@pytest.mark.parametrize(("spec", "config", "field", "words"), [
    ({"rank": 0}, {}, "rank", "from 1"),
    ({"rank": 1.5}, {}, "rank", "whole number"),
    ({"rank": 17, "targets": ["v"]}, {}, "rank", "16"),
    ({"alpha": 0}, {}, "alpha", "positive"),
    ({"targets": ["qproj"]}, {}, "targets", "did you mean 'q'"),
    ({"targets": []}, {}, "targets", "at least one"),
    ({"layers": [7]}, {}, "layers", "0 to 1"),
    ({"layers": []}, {}, "layers", "at least one"),
    ({}, {"steps": 0}, "steps", "from 1"),
    ({}, {"lr": -1}, "lr", "from 0"),
    ({}, {"batch_size": 1.5}, "batch_size", "whole number"),
    ({}, {"seed": -1}, "seed", "whole number"),
    ({"nonsense": 1}, {}, "", "no setting"),
])  # fmt: skip
def test_what_is_wrong_is_told_with_its_control(
    page: TestClient, model: str, spec: dict[str, Any], config: dict[str, Any], field: str, words: str
) -> None:
    ask(page, "model", name=model)
    body = {"model": model, "spec": {"targets": ["q"], "rank": 4, **spec}, "config": config}
    for answer in (say(page, "budget", **body), say(page, "train", **body, data={"task": "json"})):
        assert answer["field"] == field and words in answer["error"]
        assert "Traceback" not in answer["error"]


@pytest.mark.parametrize(
    ("name", "words"), [("smolm2-135m", "did you mean"), ("/nowhere", "no model folder"), ("", "no model named")]
)
def test_models_that_are_none(page: TestClient, name: str, words: str) -> None:
    answer = ask(page, "model", name=name)
    assert answer["field"] == "model" and words in answer["error"]


def test_what_is_trained_on(page: TestClient, model: str) -> None:
    a = ask(page, "data", model=model, task="sentiment", max_tokens=64)
    assert a["train_rows"] == 1000 and a["score"] == "accuracy" and 0 < a["labelled"] < a["tokens"]
    row = a["rows"][0]
    assert "".join(p["text"] for p in row["pieces"] if p["trained"]).strip()
    assert row["tokens"] >= len(row["pieces"]) and not row["cut"]
    cut = ask(page, "data", model=model, task="sentiment", max_tokens=8)
    assert cut["cut"] and all(r["cut"] for r in cut["rows"] if r["tokens"] == 8)


def test_a_file_of_ones_own(page: TestClient, model: str) -> None:
    kept = page.post("/lab/api/upload?name=shapes.txt", content=ROWS, headers=FILE).json()
    a = ask(page, "data", model=model, file=kept["file"])
    assert a["train_rows"] + a["held_rows"] == 9 and "shapes.txt" in a["about"]
    answer = say(
        page, "train", model=model, spec={}, config={"steps": 3, "max_tokens": 64}, data={"file": kept["file"]}
    )
    new = ask(page, "run", run=answer["run"])
    assert new["data"] == "shapes.txt"
    form = ask(page, "form", run=answer["run"])["form"]
    assert form["data"]["name"] == "shapes.txt" and form["config"]["steps"] == 3
    assert ask(page, "data", model=model, file=form["data"]["file"])["train_rows"] == a["train_rows"]


@pytest.mark.parametrize(("text", "words"), [
    (b"", "is empty"), (b"\xff\xfe\x00", "UTF-16"), (b"a||b\nonly a prompt\n", "line 2"), (b"\x00\x01", "NUL byte"),
])  # fmt: skip
def test_files_that_cannot_be_used(page: TestClient, model: str, text: bytes, words: str) -> None:
    kept = page.post("/lab/api/upload?name=rows.txt", content=text, headers=FILE).json()
    answer = ask(page, "data", model=model, file=kept["file"])
    assert words in answer["error"] and "rows.txt" in answer["error"]


# ---- train
def test_a_run_as_it_stands(page: TestClient, run: Run) -> None:
    v = ask(page, "run", run=run.id)
    assert v["says"] == f"run {run.id}: done" and v["step"] == v["steps"] == 6 and not v["live"]
    assert "6 steps in" in v["sentence"] and all(f"{x:.2f}" in v["sentence"] for x in (run.base_loss, run.loss))
    assert list(v["warm"]["values"]) == ["q", "v"] and v["warm"]["most"] == pytest.approx(max(
        x for row in v["warm"]["values"].values() for x in row), abs=1e-4)  # fmt: skip
    assert v["figure"]["data"] and v["rows"][0][0] == "step" and len(v["rows"]) >= 8
    again = ask(page, "run", run=run.id, seen=v["version"])
    assert "figure" not in again and again["version"] == v["version"]
    assert "figure" in ask(page, "run", run=run.id, seen="other")


def test_a_live_run_gives_its_numbers_between_two_pictures(page: TestClient, store: RunStore, run: Run) -> None:
    new = store.create(run.request)
    assert store.claim(new.id) is not None
    writer = EventWriter(store.folder(new.id) / NAME)

    def step(n: int) -> None:
        writer.append({"kind": "step", "step": n, "steps": 6, "loss": 3.0 - 0.1 * n, "tokens_per_s": 100.0})

    try:
        step(1)
        v = ask(page, "run", run=new.id, light=1)  # nothing was seen yet: all of it
        assert v["figure"]["data"] and v["live"]
        step(2)
        light = ask(page, "run", run=new.id, seen=v["version"], light=1)
        assert light["step"] == 2 and not {"figure", "rows", "warm", "version"} & set(light)
        assert ask(page, "run", run=new.id, seen=v["version"])["figure"]["data"]
        assert "figure" in ask(page, "run", run=run.id, seen="other", light=1)  # it has ended: no other will come
    finally:
        writer.close()
        store.finish(new.id, "stopped")


def test_runs_that_are_none(page: TestClient) -> None:
    for text in ("999", "x", "", "9" * 20):
        assert "run" in ask(page, "run", run=text)["error"]
    assert "no run" in say(page, "stop", run=True)["error"] and "no run" in say(page, "resume", run=999)["error"]


def test_a_run_is_started_and_ends_and_the_last_one_stands_behind_it(page: TestClient, run: Run, model: str) -> None:
    settings = {"steps": 4, "batch_size": 2, "eval_rows": 4, "max_tokens": 64}
    answer = say(
        page, "train", model=model, spec={"targets": ["v"], "rank": 2}, config=settings, data={"task": "sentiment"}
    )
    until(lambda: not ask(page, "run", run=answer["run"])["live"])
    v = ask(page, "run", run=answer["run"])
    assert v["status"] == "done" and v["behind"] == [run.id]
    assert v["beside"].startswith(f"Behind it: run {run.id}, matrices q v instead of v, r 4 instead of 2")
    assert ask(page, "run", run=answer["run"], over="none")["behind"] == []
    listed = ask(page, "runs")["runs"]
    assert [r["id"] for r in listed][0] == answer["run"] and listed[-1]["says"] == "q v · r 4"


def test_a_run_is_stopped_while_it_waits_and_goes_on(page: TestClient, store: RunStore, model: str) -> None:
    body = {"model": model, "spec": {}, "config": {"steps": 5, "step_s": 0.0}, "data": {"task": "pirate"}}
    assert "no setting" in say(page, "train", **body)["error"]  # step_s is the stand-in's own
    body["config"] = {"steps": 5, "max_tokens": 64}
    first = say(page, "train", **body)["run"]
    assert say(page, "stop", run=first)["run"] == first
    until(lambda: not ask(page, "run", run=first)["live"])
    v = ask(page, "run", run=first)
    if v["can_resume"]:
        say(page, "resume", run=first)
        until(lambda: ask(page, "run", run=first)["status"] == "done")
