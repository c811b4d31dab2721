"""The methods that LoRA is compared with, on the page: priced, trained, opened on every tab like any other run."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from app.runs.run import describe
from app.runs.store import RunStore
from lora_core.methods import DORA, METHODS, method_spec
from tests.pages_kit import ask, say, trained

OPENED = ("run", "form", "compare", "dials", "heat", "pareto", "besides")
OF_ONE = ("film", "spectrum", "microscope")  # matrix


def test_the_page_knows_all_of_them(page: TestClient) -> None:
    known = ask(page, "boot")["methods"]
    assert [m["name"] for m in known[:2]] == ["lora", "dora"] and {m["name"] for m in known} == {*METHODS, "dora"}
    assert all(m["title"] and m["about"] and m["lr"] > 0 for m in known)


@pytest.mark.parametrize("name", METHODS)
def test_each_is_priced(page: TestClient, model: str, name: str) -> None:
    assert "error" not in ask(page, "model", name=model)  # loaded
    size = 2 if METHODS[name].size else None
    spec = method_spec(name, size if name != "last-layer" else 1).to_dict()
    answer = say(page, "budget", seq=1, model=model, spec=spec, config={"steps": 2}, tokens=20, labelled=5)
    body = {"model": model, "spec": spec, "config": {"steps": 2}, "data": {"task": "pirate"}}
    if name == "bitfit":
        assert answer["error"] == say(page, "train", **body)["error"] == "'bias' hits nothing in LlamaForCausalLM"
        return
    assert answer["budget"]["trainable"] > 0 and answer["budget"]["train_bytes"] > 0
    begun = say(page, "train", **body)
    assert "run" in begun, begun


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("lora", "bitfit")])
def test_its_run_opens_on_every_tab(page: TestClient, store: RunStore, model: str, name: str) -> None:
    run = trained(store, model, spec=method_spec(name, 2 if name not in ("full", "last-layer") else None).to_dict(),
                  config={"lr": METHODS[name].lr, "steps": 3})  # fmt: skip
    assert run.status == "done" and run.adapter, run.error
    answers: dict[str, Any] = {what: ask(page, what, run=run.id) for what in OPENED}
    answers |= {what: ask(page, what, run=run.id, m="layers.1.v") for what in OF_ONE}
    view = answers["run"]
    assert view["status"] == "done" and view["sentence"].startswith(("3 steps", "No visible effect")), view
    faults = {k: a["error"] for k, a in answers.items() if a.get("error")}
    assert set(faults) <= (set() if run.request.spec["targets"] else {"dials", "heat", *OF_ONE}), faults
    assert not any(str(store.root) in f for f in faults.values()), faults
    assert all(f.startswith(f"run {run.id} has no") or "was frozen" in f for f in faults.values()), faults
    form = answers["form"]["form"]
    code = say(page, "code", model=model, spec=form["spec"], config=form["config"], data=form["data"])
    assert "error" not in code and any(w in code["command"] for w in ("--full", "--bottleneck", "--prefix")), code


def test_dora_is_one_of_them(page: TestClient, store: RunStore, model: str) -> None:
    spec = DORA.make(2).to_dict()
    asked: dict[str, Any] = {"seq": 1, "model": model, "config": {"steps": 2}, "tokens": 20, "labelled": 5}
    answer, plain = (say(page, "budget", spec=s, **asked)["budget"] for s in (spec, {**spec, "dora": False}))
    assert answer["trainable"] > plain["trainable"], "its magnitudes are counted"
    run = trained(store, model, spec=spec, config={"lr": DORA.lr, "steps": 3})
    assert run.status == "done" and describe(run) == "q v · r 2 · DoRA"
    answers = {what: ask(page, what, run=run.id) for what in OPENED}
    assert not {k: a["error"] for k, a in answers.items() if a.get("error")}
    form = answers["form"]["form"]
    code = say(page, "code", model=model, spec=form["spec"], config=form["config"], data=form["data"])
    assert "--dora" in code["command"]
    asked = {"page": "dora", "run": run.id, "m": "layers.0.q", "step": 1}
    for stage in ("forward", "finish"):
        assert "error" not in say(page, "walk", stage=stage, **asked), stage
