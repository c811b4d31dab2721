"""Spectra and the first visit without a browser: from a real run of a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.pages import adapt, compare, past, spectra, train
from app.pages.lab import Lab
from app.runs.queue import RunQueue
from app.runs.record import record
from app.runs.run import Run
from app.runs.store import RunStore
from lora_core.errors import UserError
from tests.model_folder import link_models
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


# ---- the recorded run
@pytest.fixture
def first_visit(lab: Lab, run: Run, store: RunStore, tmp_path: Path) -> Lab:
    """A lab without a run of one's own, but with a recorded one."""
    folder = record(store, run.id, tmp_path / "recorded", examples=2)
    if not (store.root.parent / "models").exists():  # the dials stand on the default model
        link_models(store.root.parent)
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
    assert past.runs(lab, {})["runs"][0]["name"] == "recorded"
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
    assert boot["run"] is None and not boot["recorded"] and past.runs(lab, {})["runs"] == []
