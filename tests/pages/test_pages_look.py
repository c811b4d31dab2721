"""Compare and Spectra without a browser: from a real run of a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.pages import adapt, compare, spectra, train
from app.pages.lab import Lab
from app.runs.queue import RunQueue
from app.runs.record import record
from app.runs.run import Run
from app.runs.store import RunStore
from lora_core.errors import UserError
from tests.pages_kit import STAND_IN, ask, trained


# ---- spectra
def test_the_map_and_one_matrix_agree_with_the_library(page: TestClient, run: Run) -> None:
    from lora_core.files import read_adapter
    from lora_core.spectra import spectra

    assert run.adapter is not None
    found = spectra(read_adapter(run.adapter))
    heat = ask(page, "heat", run=run.id)
    key = "model.layers.1.self_attn.v_proj"
    assert heat["measures"]["norm"]["values"]["v"][1] == pytest.approx(found[key].norm, abs=1e-4)
    assert heat["measures"]["stable_rank"]["values"]["v"][1] == pytest.approx(found[key].stable_rank, abs=1e-3)
    one = ask(page, "spectrum", run=run.id, m="layers.1.v")
    assert one["path"] == key and one["sigma"] == pytest.approx(found[key].singular_values)
    norms = [sum(row[i] ** 2 for row in one["rows"][1:]) for i in (1, 2)]
    assert norms[0] == pytest.approx(norms[1])  # the random update has the same norm
    assert one["rows"][-1][3:] == pytest.approx([1.0, 1.0]) and one["say"]
    assert ask(page, "spectrum", run=run.id, m="1.v")["sigma"] == one["sigma"]


@pytest.mark.parametrize(
    ("m", "words"),
    [
        ("layers.1.k", "was frozen"),
        ("layers.9.v", "was frozen"),
        ("", "names no matrix"),
        ("layers.v", "names no matrix"),
    ],
)
def test_matrices_without_a_spectrum(page: TestClient, run: Run, m: str, words: str) -> None:
    assert words in ask(page, "spectrum", run=run.id, m=m)["error"]


# ---- compare
def test_both_texts_are_written_and_the_newest_question_wins(lab: Lab, run: Run) -> None:
    states = list(compare.stream(lab, {"run": run.id, "prompt": "a fine film", "page": "p", "seq": 1}))
    last = states[-1]
    assert last["done"] and last["seq"] == 1 and "error" not in last and isinstance(last["tokens"], list)
    assert all(set(t) == {"t", "d", "p", "base", "adapted"} for t in last["tokens"])
    compare.TICKETS.take("p", 5)
    assert not any(s.get("done") for s in compare.stream(lab, {"run": run.id, "prompt": "x", "page": "p", "seq": 2}))


def test_nothing_kept_is_the_base_and_all_kept_is_the_adapter(lab: Lab, run: Run) -> None:
    none = list(compare.stream(lab, {"run": run.id, "prompt": "a fine film", "k": 0, "page": "q", "seq": 1}))[-1]
    assert none["base"] == none["adapted"] and none["tokens"] == []
    assert compare.loss_at(lab, {"run": run.id, "k": 0})["loss"] == pytest.approx(run.base_loss, abs=1e-4)
    assert compare.loss_at(lab, {"run": run.id, "k": 4})["loss"] == pytest.approx(run.loss, abs=1e-4)
    with lab.session.model(run.request.model) as loaded:
        assert run.adapter is not None
        assert lab.session.adapter(loaded, run.id, run.adapter, 2) == f"run-{run.id}-k2"


def test_a_cut_keeps_what_was_trained_beside_it(lab: Lab, run: Run, tmp_path: Path) -> None:
    """DoRA's W' − W0 is what is cut, and trained norms stay with it, down to the base model at k = 0."""
    import torch

    import lora_core as lc

    with lab.session.model(run.request.model) as loaded:
        spec = lc.LoraSpec(targets=("q", "norm"), rank=2, dora=True)
        made = lc.attach(loaded.model, spec, "made")
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in made.parameters():
                p.add_(torch.randn(p.shape, generator=g) * 0.1)
        made.save(tmp_path / "made")
        made.detach()
        ids = torch.tensor([[1, 5, 9, 7]])

        def out(k: int | None) -> torch.Tensor:
            lc.switch(loaded.model, None, None if k == 0 else lab.session.adapter(loaded, 777, tmp_path / "made", k))
            with torch.no_grad():
                return loaded.model(ids).logits

        whole, base = out(None), out(0)
        lc.switch(loaded.model, None, lab.session.adapter(loaded, 777, tmp_path / "made", 0))
        with torch.no_grad():
            torch.testing.assert_close(loaded.model(ids).logits, base)
        far = [float((out(k) - whole).norm()) for k in (1, 8, 31)]
        assert far[0] > far[1] > far[2] and far[2] < 0.1 * float((base - whole).norm())
        lc.switch(loaded.model, None, None)


def test_few_adapters_stay_attached(lab: Lab, run: Run) -> None:
    import lora_core as lc
    from app.pages.session import ATTACHED

    assert run.adapter is not None
    with lab.session.model(run.request.model) as loaded:
        for id in range(1000, 1000 + ATTACHED + 2):
            name = lab.session.adapter(loaded, id, run.adapter)
        assert len(loaded.attached) == ATTACHED and lc.get_adapter(loaded.model, name).name == name
        with pytest.raises(UserError):
            lc.get_adapter(loaded.model, "run-1000")


@pytest.mark.parametrize(("asked", "words"), [
    ({"prompt": ""}, "write a prompt"),
    ({"prompt": "x" * 30_000}, "at most"),
    ({"prompt": "x", "run": 999}, "no run"),
    ({"prompt": "x", "run": None}, "is no run"),
])  # fmt: skip
def test_questions_that_cannot_be_answered(lab: Lab, run: Run, asked: dict[str, Any], words: str) -> None:
    last = list(compare.stream(lab, {"run": run.id, "page": "e", "seq": 1, **asked}))[-1]
    assert last["done"] and words in last["error"]


def test_what_compare_opens_with(page: TestClient, run: Run) -> None:
    a = ask(page, "compare", run=run.id)
    assert a["ready"] and a["rank"] == 4 and a["loss"]["adapted"] == run.loss and len(a["examples"]) == 12
    assert a["examples"][0]["reference"]


# ---- the recorded run
@pytest.fixture
def first_visit(lab: Lab, run: Run, store: RunStore, tmp_path: Path) -> Lab:
    """A lab without a run of one's own, but with a recorded one."""
    folder = record(store, run.id, tmp_path / "recorded", examples=2)
    empty = RunStore(tmp_path / "home", recorded=folder)
    return Lab(store=empty, queue=RunQueue(empty, command=STAND_IN), session=lab.session, uploads=lab.uploads,
               experiments=lab.experiments)  # fmt: skip


def test_the_first_visit_is_not_empty(first_visit: Lab, run: Run) -> None:
    lab = first_visit
    boot = adapt.boot(lab, {})
    assert boot["run"] == 0 and boot["recorded"] and boot["form"]["says"] is None  # the dials are the defaults
    view = train.view(lab, {"run": "0"})
    assert view["recorded"] and view["status"] == "done" and view["says"].startswith("recorded run")
    assert view["figure"]["data"][0]["x"] and view["warm"]["most"] > 0 and view["sentence"]
    assert train.runs(lab, {})["runs"][0]["name"] == "recorded"
    opened = compare.opened(lab, {"run": "0"})
    assert (
        opened["ready"]
        and [e["adapted"] is not None and e["tokens"] is not None for e in opened["examples"]] == [True] * 2
    )
    heat = spectra.heat(lab, {"run": "0"})
    assert heat["recorded"] and spectra.one(lab, {"run": "0", "m": heat["first"]})["run"] == 0


def test_after_the_first_own_run_the_recorded_one_stands_behind_it(first_visit: Lab, run: Run) -> None:
    lab = first_visit
    own = trained(lab.store, run.request.model, config={"steps": 3})
    assert adapt.boot(lab, {})["run"] == own.id
    view = train.view(lab, {"run": str(own.id)})
    assert view["behind"] == [0] and view["beside"].startswith("Behind it: the recorded run, steps 6 instead of 3")
    other = trained(lab.store, run.request.model, task="pirate", config={"steps": 2})
    assert train.view(lab, {"run": str(other.id)})["behind"] == []  # a loss on other rows says nothing beside it


def test_without_a_recorded_run_the_page_says_what_will_be_here(lab: Lab, tmp_path: Path) -> None:
    empty = RunStore(tmp_path, recorded=tmp_path / "nothing")
    lab = Lab(store=empty, queue=RunQueue(empty, command=STAND_IN), session=lab.session, uploads=lab.uploads,
               experiments=lab.experiments)  # fmt: skip
    boot = adapt.boot(lab, {})
    assert boot["run"] is None and not boot["recorded"] and train.runs(lab, {})["runs"] == []
