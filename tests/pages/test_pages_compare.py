"""Compare without a browser, from a real run of a tiny model: dials, losses along them, words, saving a cut.

The model may be in bfloat16, whose last digits depend on the batch; the exact comparisons are the library's tests.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.pages import along, compare, cut, held, spectra, train
from app.pages.lab import Lab
from app.pages.settings import STRENGTHS, cuts_of, setting_of
from app.runs.recorded import recorded_run
from app.runs.run import Run
from app.runs.store import RunStore
from lora_core.errors import UserError
from tests.pages_kit import ask, say, trained


def last(lab: Lab, **asked: Any) -> dict[str, Any]:
    return list(compare.stream(lab, {"prompt": "a fine film", "page": "p", **asked}))[-1]


# ---- texts
def test_both_texts_are_written_and_the_newest_question_wins(lab: Lab, run: Run) -> None:
    done = last(lab, run=run.id, seq=1)
    assert done["done"] and done["seq"] == 1 and "error" not in done and len(done["texts"]) == 2
    assert all(set(t) == {"t", "d", "kl", "p", "base", "adapted"} and t["kl"] >= 0 for t in done["tokens"])
    compare.TICKETS.take("p", 5)
    assert not any(s.get("done") for s in compare.stream(lab, {"run": run.id, "prompt": "x", "page": "p", "seq": 2}))


@pytest.mark.parametrize(("asked", "words"), [
    ({"prompt": ""}, "write a prompt"),
    ({"prompt": "x" * 30_000}, "at most"),
    ({"prompt": "x", "run": 999}, "no run"),
    ({"prompt": "x", "run": None}, "is no run"),
    ({"setting": {"by": "k", "at": 99}}, "the dial has 5 places"),
    ({"setting": {"by": "speed", "at": 1}}, "the dial has 0 places"),
    ({"setting": {"strength": 99}}, "a number from"),
    ({"setting": {"off": ["layers.7.v"]}}, "'layers.7.v' is no matrix"),
    ({"setting": {"off": "v"}}, "a list of matrices"),
    ({"sides": []}, "from one to 5"),
])  # fmt: skip
def test_questions_that_cannot_be_answered(lab: Lab, run: Run, asked: dict[str, Any], words: str) -> None:
    found = last(lab, **{"run": run.id, "page": "e", "seq": 1, **asked})
    assert found["done"] and words in found["error"]


def test_what_compare_opens_with(page: TestClient, run: Run) -> None:
    a = ask(page, "compare", run=run.id)
    assert a["ready"] and a["rank"] == 4 and a["loss"]["adapted"] == run.loss and len(a["examples"]) == 12
    assert a["examples"][0]["reference"]


# ---- dials
def test_the_ticks_of_the_three_dials_are_those_of_compress(page: TestClient, run: Run, tmp_path: Path) -> None:
    import lora_core as lc

    d = ask(page, "dials", run=run.id)
    assert d["matrices"] == 4 and d["rank"] == 4 and d["strengths"] == list(STRENGTHS)
    assert set(d["norms"]) == {"q", "v"} and all(v > 0 for row in d["norms"].values() for v in row)
    assert [t["x"] for t in d["ticks"]["k"]] == [0, 1, 2, 3, 4]
    assert run.adapter is not None
    for by, how in (("k", "rank"), ("energy", "energy"), ("mb", "mb")):
        ticks = d["ticks"][by]
        assert ticks[-1]["kept"] == 1 and [t["bytes"] for t in ticks] == sorted(t["bytes"] for t in ticks)
        t = ticks[len(ticks) // 2]
        size: dict[str, Any] = {how: t["x"] if by != "k" else int(t["x"])}
        small = lc.compress(run.adapter, tmp_path / by, **size)
        assert t["bytes"] == small.file_bytes and t["kept"] == pytest.approx(small.kept_energy, abs=1e-5)
        assert t["mean"] == pytest.approx(sum(small.ranks.values()) / 4)


def test_nothing_left_is_the_base_and_everything_is_the_adapter(lab: Lab, run: Run) -> None:
    for setting in (
        {"by": "k", "at": 0},
        {"strength": 0},
        {"off": ["layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v"]},
    ):
        none = last(lab, run=run.id, setting=setting, measure=True, page="q", seq=1)
        assert none["texts"][0] == none["texts"][1] and none["tokens"] == []
        assert none["losses"][1] == pytest.approx(run.base_loss, abs=5e-3) and none["rows"] == none["of"] == 4
    cuts = cuts_of(run)
    assert setting_of(cuts, {"by": "k", "at": 4}).whole and setting_of(cuts, None).whole
    whole = last(lab, run=run.id, setting={"by": "energy", "at": 8}, measure=True, page="q", seq=1)
    assert whole["losses"] == pytest.approx([run.base_loss, run.loss], abs=5e-3)


def test_a_setting_is_what_merging_it_by_hand_gives(lab: Lab, run: Run) -> None:
    """A cut, a strength and a switch together: the loss with W0 + ΔW' written into the weights."""
    import torch

    import lora_core as lc

    setting = {"by": "k", "at": 2, "strength": -0.5, "off": ["layers.1.q"]}
    found = last(lab, run=run.id, setting=setting, measure=True, page="m", seq=1)["losses"][1]
    with lab.session.model(run.request.model) as loaded, torch.no_grad():
        assert run.adapter is not None
        a = lc.get_adapter(loaded.model, lab.session.adapter(loaded, run.id, run.adapter))
        kept = {}
        for key, d in a.deltas().items():
            W = loaded.model.get_submodule(a.sites[key].path).weight
            kept[key] = W.clone()
            if key != "model.layers.1.self_attn.q_proj":
                W += -0.5 * d.truncate(2).dense()
        objective, items = held.encoded(lab, run, loaded)
        for other in [n for n in loaded.attached]:
            lc.get_adapter(loaded.model, other).enable(False)
        want = sum(float(objective.loss(objective.batch([e]))) for e in items)
        for key, W in kept.items():
            loaded.model.get_submodule(a.sites[key].path).weight.copy_(W)
        labelled = sum(objective.batch([e]).labelled for e in items)
    assert found == pytest.approx(want / labelled, rel=1e-3)


def test_doras_magnitudes_stay_and_do_not_scale(lab: Lab, run: Run, tmp_path: Path) -> None:
    import torch

    import lora_core as lc

    with lab.session.model(run.request.model) as loaded:
        spec = lc.LoraSpec(targets=("q", "norm"), rank=3, dora=True)
        made = lc.attach(loaded.model, spec, "made")
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in made.parameters():
                p.add_(torch.randn(p.shape, generator=g) * 0.1)
        made.save(tmp_path / "made")
        made.detach()
        ids = torch.tensor([[1, 5, 9, 7]])

        def out(ranks: Any) -> torch.Tensor:
            lc.switch(loaded.model, None, lab.session.dialled(loaded, 777, tmp_path / "made", ranks, 1.0))
            with torch.no_grad():
                return loaded.model(ids).logits

        lc.switch(loaded.model, None, lab.session.adapter(loaded, 777, tmp_path / "made"))
        with torch.no_grad():
            whole = loaded.model(ids).logits
        torch.testing.assert_close(out(None), whole, rtol=0.02, atol=2e-3)  # bfloat16
        far = [float((out(k) - whole).norm()) for k in (1, 2)]
        assert far[0] > far[1] > 0
        lc.switch(loaded.model, None, None)
    from dataclasses import replace

    cuts = cuts_of(replace(run, id=777, adapter=tmp_path / "made"))
    assert cuts.dora and setting_of(cuts, {"by": "k", "at": 0}).base
    for setting in ({"strength": 0.5}, {"off": ["layers.0.q"]}):
        with pytest.raises(UserError, match="DoRA's magnitudes"):
            setting_of(cuts, setting)


# ---- held-out losses along the dials
def test_the_losses_along_the_dials_are_measured_kept_and_those_of_one_alone(lab: Lab, run: Run) -> None:
    bench, seen = held.Bench(lab), None
    with lab.session.model(run.request.model):
        pass
    h = bench.of(run)
    h.wanted = True
    for _ in range(20):
        if h.complete:
            break
        with lab.session.model(run.request.model) as loaded:
            held.measure(lab, h, loaded)
    assert h.complete and set(h.families) == {"k", "mb", "energy", "strength"}
    by_k = h.families["k"].values()
    assert by_k is not None and by_k[0] == pytest.approx(run.base_loss, abs=5e-3)
    assert by_k[-1] == pytest.approx(run.loss, abs=5e-3)
    alone = last(lab, run=run.id, setting={"by": "mb", "at": 2}, measure=True, page="l", seq=1)["losses"][1]
    seen = h.families["mb"].values()
    assert seen is not None and seen[2] == pytest.approx(alone, rel=1e-3)
    strength = h.families["strength"].values()
    assert strength is not None and strength[STRENGTHS.index(0)] == pytest.approx(by_k[0], rel=1e-3)
    assert h.holders and len(h.holders["keys"]) == 1 and h.holders["keys"][0] in cuts_of(run).addresses().values()
    again = along.load(run, cuts_of(run))  # as a server that starts anew
    assert again.complete and again.families["k"].values() == by_k and again.holders == h.holders
    answer = held.curve(lab, {"run": str(run.id)})
    assert answer["done"] and answer["families"]["k"]["loss"] == pytest.approx(by_k)
    assert set(answer["figures"]) == {"cut", "strength"}


def test_the_losses_of_the_recorded_run_come_with_it(home: Path) -> None:
    recorded = recorded_run()
    assert recorded is not None
    h = along.load(recorded, cuts_of(recorded))  # a folder of its own: what is known has been shipped
    by_k = h.families["k"].values()
    assert by_k is not None and h.families["k"].rows == h.families["mb"].rows == h.of == 64
    assert by_k[0] == pytest.approx(recorded.base_loss, abs=5e-3)
    assert by_k[-1] == pytest.approx(recorded.loss, abs=5e-3) and h.holders is not None


def test_what_cannot_be_measured_is_said_once(lab: Lab, run: Run) -> None:
    from dataclasses import replace

    bench, h = held.Bench(lab), along.load(replace(run, result={"objective": "preference"}), cuts_of(run))
    with lab.session.model(run.request.model):
        pass
    h.of, h.asked = 0, 1e18
    for family in h.families.values():
        family.rows = 0
    bench.held["x"] = h
    bench._work()
    assert h.failed and h.complete and "did not learn to write" in h.says


def test_measuring_gives_way_to_whoever_wants_the_model(lab: Lab, run: Run) -> None:
    h = along.load(run, cuts_of(run))
    for family in h.families.values():
        family.sums, family.labelled, family.rows = [], 0, 0
    with lab.session.model(run.request.model) as loaded:
        lab.session.waiting.append(None)
        try:
            held.measure(lab, h, loaded)
        finally:
            lab.session.waiting.pop()
    assert all(f.rows == 0 for f in h.families.values()) and not h.complete


# ---- words
def test_any_text_is_read_by_both_models(page: TestClient, lab: Lab, run: Run) -> None:
    import lora_core as lc

    text = "A fine film, and not too long."
    found = say(page, "speaks", run=run.id, text=text, page="w", seq=1)
    with lab.session.model(run.request.model) as loaded:
        assert run.adapter is not None
        name = lab.session.adapter(loaded, run.id, run.adapter)
        want = lc.text_differences(loaded.model, loaded.tokenizer, text, name)
    assert [t["t"] for t in found["tokens"]] == [d.text for d in want]
    assert [t["kl"] for t in found["tokens"]] == pytest.approx([d.kl for d in want], abs=1e-5)
    assert say(page, "speaks", run=run.id, text=text, setting={"strength": 0}, page="w", seq=2)["base"]
    assert say(page, "speaks", run=run.id, text=text, page="w", seq=1)["stale"]
    answer = say(page, "speaks", run=run.id, text="positive", prompt="A fine film", page="w", seq=3)
    assert "".join(t["t"] for t in answer["tokens"]).strip() == "positive"
    assert "characters" in say(page, "speaks", run=run.id, text=7, page="w", seq=4)["error"]


# ---- saving
def test_a_saved_cut_is_a_run_that_gives_what_was_shown(page: TestClient, lab: Lab, run: Run) -> None:
    from lora_core.files import read_adapter

    setting = {"by": "k", "at": 2, "strength": 0.75, "off": ["layers.0.q"]}
    r = cut.save(lab, {"run": run.id, "setting": setting})
    assert r["saved"] == pytest.approx(r["shown"], abs=1e-3) and r["bytes"] < r["before_bytes"] and r["rounding"] < 1e-6
    shown = last(lab, run=run.id, setting=setting, measure=True, page="s", seq=1)["losses"][1]
    assert r["saved"] == pytest.approx(shown, rel=1e-3)
    new = lab.store.get(r["run"])
    assert (
        new.status == "done" and new.request.title == f"run {run.id}, 2 of 4 directions, 3 of 4 matrices, strength 0.75"
    )
    assert new.loss == r["saved"] and new.adapter is not None and new.result["cut_from"] == run.id
    assert {k: len(s.A) for k, s in read_adapter(new.adapter).sites.items()} == {
        f"model.layers.{n}": 2 for n in ("0.self_attn.v_proj", "1.self_attn.q_proj", "1.self_attn.v_proj")}  # fmt: skip
    answer = page.get("/lab/api/adapter.zip", params={"run": new.id})
    assert (
        answer.headers["content-type"] == "application/zip" and f"run-{new.id}" in answer.headers["content-disposition"]
    )
    with zipfile.ZipFile(io.BytesIO(answer.content)) as z:
        names = {Path(n).name for n in z.namelist()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= names
        assert z.read(f"run-{new.id}-adapter/adapter_model.safetensors") == (
            new.adapter / "adapter_model.safetensors").read_bytes()  # fmt: skip
    asked = {"run": str(new.id)}
    assert train.view(lab, asked)["status"] == "done" and spectra.heat(lab, asked)["measures"]
    before = len(lab.store.list())
    with pytest.raises(UserError, match="the base model"):
        cut.save(lab, {"run": run.id, "setting": {"strength": 0}})
    assert len(lab.store.list()) == before
    lab.store.delete(new.id)
    assert "no run" in ask(page, "adapter.zip", run=999)["error"]


# ---- side by side
@pytest.fixture(scope="module")
def other(store: RunStore, model: str) -> Run:
    """A second run of the model, of another task, rank and matrices."""
    return trained(store, model, task="pirate", spec={"targets": ["v", "o"], "rank": 2}, config={"steps": 3})


def test_runs_cuts_and_sums_side_by_side_are_those_alone(lab: Lab, run: Run, other: Run) -> None:
    import torch

    import lora_core as lc

    half = {"by": "k", "at": None, "strength": 0.5, "off": []}
    sides = [{"run": None}, {"run": run.id}, {"run": run.id, "setting": half}, {"run": other.id},
             {"run": run.id, "plus": other.id}]  # fmt: skip
    found = last(lab, run=run.id, sides=sides, measure=True, page="sides", seq=1)
    assert len(found["texts"]) == len(found["losses"]) == 5 and found["done"] and found["tokens"] == []
    for i in (0, 1):
        assert found["losses"][i] == pytest.approx((run.base_loss, run.loss)[i], abs=5e-3)
    alone = last(lab, run=run.id, setting=half, measure=True, page="sides", seq=2)
    assert found["losses"][2] == pytest.approx(alone["losses"][1], rel=1e-3)
    assert found["texts"][2] == alone["texts"][1] and found["texts"][0] == alone["texts"][0]
    with lab.session.model(run.request.model) as loaded, torch.no_grad():  # both on at once are their sum
        objective, items = held.encoded(lab, run, loaded)
        both = [f"run-{run.id}", f"run-{other.id}"]
        for name in loaded.attached:
            lc.get_adapter(loaded.model, name).enable(name in both)
        want = sum(float(objective.loss(objective.batch([e]))) for e in items)
        for name in both:
            lc.get_adapter(loaded.model, name).enable(False)
        labelled = sum(objective.batch([e]).labelled for e in items)
    assert found["losses"][4] == pytest.approx(want / labelled, rel=1e-3)
    twice = last(lab, run=run.id, sides=[{"run": run.id, "plus": run.id}], page="sides", seq=3)
    assert "strength to 2" in twice["error"]


def test_a_pair_and_its_sum_on_both_tasks(page: TestClient, lab: Lab, run: Run, other: Run) -> None:
    import lora_core as lc

    listed = {r["id"]: r for r in ask(page, "sides", run=run.id)["runs"]}
    assert {run.id, other.id} <= set(listed) and listed[other.id]["data"] == "pirate"
    fit = ask(page, "fit", run=run.id, other=other.id, m="layers.1.v")
    assert run.adapter is not None and other.adapter is not None
    want = lc.merge_fit(lc.read_adapter(run.adapter), lc.read_adapter(other.adapter))
    assert fit["cosine"] == pytest.approx(want.cosine) and fit["shared"] == 2 and fit["alone"] == [2, 2]
    assert "cosine" in fit["say"] and len(fit["rows"]) == 3 and "layer 1, v" in str(fit["figures"]["spectra"])
    assert [len(t["y"]) for t in fit["figures"]["similarity"]["data"]] == [2]
    summed = say(page, "sum", run=run.id, other=other.id, page="x", seq=1)
    assert [t["data"] for t in summed["tasks"]] == ["sentiment", "pirate"] and "Added up" in summed["say"]
    assert summed["tasks"][0]["losses"][:2] == pytest.approx([run.base_loss, run.loss], abs=5e-3)
    assert summed["tasks"][1]["losses"][0] == pytest.approx(other.base_loss, abs=5e-3)
    assert summed["tasks"][1]["losses"][2] == pytest.approx(other.loss, abs=5e-3)
    assert "choose two" in say(page, "sum", run=run.id, other=run.id, page="x", seq=2)["error"]
    compare.TICKETS.take("sum-x", 9)
    assert say(page, "sum", run=run.id, other=other.id, page="x", seq=3) == {"stale": True}
