"""The microscope, opened files and two adapters, without a browser: from runs of a tiny model."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient

import lora_core as lc
from app.pages import besides, opened, owners, words_spectra
from app.runs.run import Run
from app.runs.store import RunStore
from lora_core.beside import svd
from tests.pages_kit import FILE, ask, say, trained


def send(page: TestClient, *files: Path, name: str = "mine") -> dict[str, Any]:
    """Files into one set, and the set opened; the first refusal as it is."""
    kept = ""
    for file in files:
        answer = page.post("/lab/api/open-file", params={"name": file.name, "set": kept}, content=file.read_bytes(),
                           headers=FILE).json()  # fmt: skip
        if "error" in answer:
            return answer
        kept = answer["set"]
    return say(page, "open", set=kept, name=name)


def whole(page: TestClient, what: str, **query: Any) -> dict[str, Any]:
    """The answer, once what it waits for is there."""
    for _ in range(200):
        answer = ask(page, what, **query)
        if not (answer.get("pending") or what == "besides" and not answer.get("measures") and "away" not in answer):
            return answer
        time.sleep(0.05)
    raise AssertionError(answer)


# ---- the microscope
def test_one_matrix_beside_its_W0(page: TestClient, run: Run, model: str) -> None:
    one: dict[str, Any] = {}
    for i, part in enumerate(("beside", "tokens", "spectrum")):
        one |= ask(page, "microscope", run=run.id, m="layers.1.v", part=part, page="a", seq=i)
    assert run.adapter is not None
    stored = lc.read_adapter(run.adapter)
    site = stored.sites["model.layers.1.self_attn.v_proj"]
    W0 = load_file(Path(model) / "model.safetensors")["model.layers.1.self_attn.v_proj.weight"].double().numpy()
    sigma = np.linalg.svd(W0, compute_uv=False)
    drawn = next(t for t in one["figure"]["data"] if t["name"] == "W0")
    assert drawn["y"] == pytest.approx(sigma[:4].tolist(), rel=1e-5)
    U, _, V = svd(site.B, site.A, site.scaling)
    table = dict(one["table"])
    assert table["ΔW's directions"] == pytest.approx(np.linalg.norm(U.T @ W0 @ V), rel=1e-5)
    assert table["W0's own strongest"] == pytest.approx(np.sqrt((sigma[:4] ** 2).sum()), rel=1e-5)
    assert "times as large as W0" in one["besideSay"] and one["word"] in one["say"] + "dead collapsed partly used full"
    assert [t["side"] for t in one["tokens"]] == ["reads", "writes"] and one["tokens"][1]["through"] == "o"
    assert all(isinstance(text, str) for text, _ in one["tokens"][0]["poles"][0][0])
    assert one["more"][0][0].startswith("effective") and one["rows"][0][-1] == "sigma of W0"


def test_a_newer_question_ends_an_older_one(page: TestClient, run: Run) -> None:
    ask(page, "microscope", run=run.id, m="layers.0.q", page="b", seq=9)
    assert ask(page, "microscope", run=run.id, m="layers.1.q", page="b", seq=3) == {"stale": True}
    assert "possible: spectrum beside tokens" in ask(page, "microscope", run=run.id, m="1.q", part="x")["error"]


def test_the_maps_measures_beside_W0_are_kept(page: TestClient, run: Run, home: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    found = whole(page, "besides", run=run.id)
    one = ask(page, "microscope", run=run.id, m="layers.1.v", part="beside", page="c", seq=1)
    told = dict(one["beside"])
    assert found["measures"]["amplification"]["values"]["v"][1] == pytest.approx(float(told["amplification"]), rel=0.01)
    assert "section 7.3" in found["measures"]["amplification"]["say"]
    assert "random ones" in found["measures"]["overlap"]["say"]
    for _ in range(100):
        if list((home / "beside").glob("*.json")):
            break
        time.sleep(0.05)
    besides._jobs.clear()
    monkeypatch.setattr(besides, "work", lambda *_: pytest.fail("it is on the disk"))
    assert ask(page, "besides", run=run.id)["measures"] == found["measures"]


def test_every_matrix_has_the_word_of_the_audit(page: TestClient, run: Run) -> None:
    heat = ask(page, "heat", run=run.id)
    assert run.adapter is not None
    for m in lc.audit(lc.read_adapter(run.adapter)).matrices:
        assert heat["words"][f"layers.{m.layer}.{m.target}"] == m.word and m.word in heat["rules"]
    assert heat["verdicts"].startswith("By the use of their rank: ")
    assert set(heat["grades"]) == set(heat["rules"]) and set(heat["grades"].values()) == {"good", "weak", "collapsed"}
    said = words_spectra.verdicts(["full", "full", "partly used", "dead", "collapsed"])
    assert said == "By the use of their rank: 3 good (2 full, 1 partly used), 1 weak (1 dead), 1 collapsed."


# ---- files
def test_a_runs_own_folder_opens_as_a_file_would(page: TestClient, run: Run) -> None:
    assert run.adapter is not None
    parts = [run.adapter / n for n in ("adapter_config.json", "adapter_model.safetensors", "lora_lab.json")]
    done = send(page, *parts, name="C:\\somewhere\\mine")
    assert done.get("name") == "mine", done
    heat, own = ask(page, "heat", open=done["open"]), ask(page, "heat", run=run.id)
    assert heat["measures"] == own["measures"] and heat["file"]["kind"] == "PEFT" and heat["open"] == done["open"]
    assert ask(page, "spectrum", open=done["open"], m="layers.1.v")["sigma"] == pytest.approx(
        ask(page, "spectrum", run=run.id, m="layers.1.v")["sigma"])  # fmt: skip
    assert any(o["id"] == done["open"] for o in ask(page, "opened")["opened"])
    alone = send(page, parts[1], name="adapter_model.safetensors")
    assert "s = 1" in ask(page, "heat", open=alone["open"])["file"]["remarks"][0]
    away = ask(page, "microscope", open=alone["open"], m="layers.1.v", page="d", seq=1)
    assert "does not say which base model" in away["away"]


def test_doras_update_is_that_of_the_whole_matrix(page: TestClient, store: RunStore, model: str, run: Run) -> None:
    made = trained(store, model, spec={"dora": True, "rank": 2}, config={"lr": 0.05})
    heat = whole(page, "heat", run=made.id)
    assert "has full rank" in heat["note"] and heat["rank"] == 32 and heat["file"] is None
    loaded, _ = lc.load_model(model, device="cpu", dtype="float32")
    a = lc.load_adapter(loaded, made.adapter or "", "a")
    for name, layer in (("q", 0), ("v", 1)):
        key = next(k for k, s in a.sites.items() if (s.target, s.layer) == (name, layer))
        sigma = torch.linalg.svdvals(a.delta(key).double().dense()).tolist()
        one = ask(page, "spectrum", run=made.id, m=f"layers.{layer}.{name}")
        assert one["sigma"] == pytest.approx(sigma, abs=1e-5 * sigma[0]) and sigma[2] > 1e-4 * sigma[0]
        assert heat["measures"]["norm"]["values"][name][layer] == pytest.approx(
            one["facts"][0] and float(np.linalg.norm(sigma)), rel=1e-3
        )
    behind = ask(page, "microscope", run=made.id, m="layers.0.q", page="dora", seq=1)["baseSigma"]
    key = next(k for k, s in a.sites.items() if (s.target, s.layer) == ("q", 0))
    assert behind == pytest.approx(torch.linalg.svdvals(a.W0(key).double()).tolist(), rel=1e-4)
    look = ask(page, "microscope", run=made.id, m="layers.0.q", part="beside", page="dora", seq=2)
    assert look["directions"] == 16 and look["besideSay"]
    assert ask(page, "microscope", run=made.id, m="layers.0.q", part="tokens", page="dora", seq=3)["tokens"]
    assert whole(page, "besides", run=made.id)["measures"]["amplification"]["values"]["q"][0] > 0
    with_it = ask(page, "spectrum", run=run.id, m="layers.0.q", **{"with": str(made.id)})
    assert with_it["overSay"]
    assert "as DoRA's, has all of its directions" in ask(page, "pair", run=run.id, **{"with": str(made.id)})["error"]


def test_a_checkpoint_is_compared_in_the_background(page: TestClient, model: str, tmp_path: Path) -> None:
    weights = load_file(Path(model) / "model.safetensors")
    for n, w in weights.items():
        if "o_proj" in n:
            w += 0.01 * torch.randn(w.shape)
    save_file(weights, tmp_path / "tuned.safetensors")
    kept = page.post("/lab/api/open-file", params={"name": "tuned.safetensors"},
                     content=(tmp_path / "tuned.safetensors").read_bytes(), headers=FILE).json()["set"]  # fmt: skip
    done = say(page, "open", set=kept, name="tuned.safetensors", base=model)
    heat = whole(page, "heat", open=done["open"])
    assert heat["measures"]["norm"]["values"]["o"][0] > 0.1 and heat["measures"]["norm"]["values"]["q"] == [0, 0]
    assert heat["words"]["layers.0.q"] == "dead" and heat["rank"] == 32
    one = ask(page, "spectrum", open=done["open"], m="layers.0.o")
    assert len(one["sigma"]) == 32
    null = [row[2] for row in one["rows"][1:]]
    assert np.square(null).sum() == pytest.approx(np.square(one["sigma"]).sum())
    assert null == pytest.approx(one["sigma"], abs=0.15 * null[0]), "an update of noise looks like its control"
    look = ask(page, "microscope", open=done["open"], m="layers.0.o", part="beside", page="e", seq=1)
    assert look["directions"] == 16
    assert ask(page, "microscope", open=done["open"], m="layers.0.o", part="tokens", page="e", seq=2)["tokens"]
    W0 = load_file(Path(model) / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"]
    other = tmp_path / "other"  # another base, which is the first one with its o moved
    shutil.copytree(model, other)
    save_file(load_file(tmp_path / "tuned.safetensors"), other / "model.safetensors", metadata={"format": "pt"})
    assert say(page, "open", set=kept, base=str(other))["open"] == kept
    same = whole(page, "heat", open=kept)
    assert same["base"] == str(other) and same["measures"]["norm"]["values"]["o"] == [0, 0]
    wrong = say(page, "open", set=kept, base="no such model")
    assert wrong["field"] == "base" and "not on this machine" in wrong["error"]
    assert ask(page, "heat", open=kept)["base"] == str(other), "the base that it had stays"
    say(page, "open", set=kept, base=model)
    whole(page, "heat", open=kept)
    drawn = ask(page, "microscope", open=done["open"], m="layers.0.o", page="e", seq=3)["baseSigma"]
    assert drawn == pytest.approx(torch.linalg.svdvals(W0).tolist(), rel=1e-4)


@pytest.mark.parametrize(("name", "body", "words"), [
    ("x.pt", b"", "is a pickle, which can run code"),
    ("x.safetensors", b"\x80\x04\x95junk", "is a pickle"),
    ("x.safetensors", b"junk and more junk", "x.safetensors is no safetensors file"),
    ("x.zip", b"PK\x03\x04junk", "x.zip cannot be unpacked"),
    ("x.exe", b"", "is no part of an adapter"),
    ("adapter_config.json", b"{}", "no adapter"),
])  # fmt: skip
def test_what_cannot_be_opened_is_told_and_does_not_stay(page: TestClient, home: Path, tmp_path: Path, name: str,
                                                         body: bytes, words: str) -> None:  # fmt: skip
    before = sorted((home / "opened").glob("*")) if (home / "opened").exists() else []
    (tmp_path / name).write_bytes(body)
    answer = send(page, tmp_path / name)
    assert words in answer["error"] and str(home) not in answer["error"]
    assert sorted((home / "opened").glob("*")) == before


def test_sizes_are_bounded_and_old_sets_go(page: TestClient, run: Run, home: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    assert run.adapter is not None
    file = run.adapter / "adapter_model.safetensors"
    monkeypatch.setattr(owners, "MINE", replace(owners.MINE, set_bytes=100))
    assert "is too large" in send(page, file)["error"]
    monkeypatch.setattr(owners, "MINE", replace(owners.MINE, set_bytes=1 << 30, sets=3))
    ids = [send(page, file)["open"] for _ in range(4)]
    assert len(list((home / "opened").iterdir())) == 3
    assert "no longer here" in ask(page, "heat", open=ids[0])["error"]
    assert "no longer here" in ask(page, "heat", open="../runs")["error"]
    opened.Sets(home).sweep(older_s=-1)
    assert ask(page, "opened")["opened"] == []


def test_uploads_of_adapters_are_the_files_themselves(page: TestClient) -> None:
    assert page.post("/lab/api/open-file", json={}).status_code == 415
    cross = page.post("/lab/api/open-file", content=b"x", headers={**FILE, "sec-fetch-site": "cross-site"})
    assert cross.status_code == 403


# ---- two adapters
def test_phi_of_two_runs_is_that_of_the_library(page: TestClient, run: Run, store: RunStore, model: str) -> None:
    other = trained(store, model, spec={"rank": 2}, config={"seed": 5})
    assert run.adapter is not None and other.adapter is not None
    p = ask(page, "pair", **{"run": run.id, "with": other.id})
    A, B = lc.read_adapter(run.adapter), lc.read_adapter(other.adapter)
    key = "model.layers.1.self_attn.q_proj"
    dense = [s.sites[key].scaling * s.sites[key].B @ s.sites[key].A for s in (A, B)]
    assert p["ks"] == ["1", "2"] and p["note"] == "" and p["name"] == f"run {other.id}"
    for k in (1, 2):
        assert p["phi"][str(k)]["values"]["q"][1] == pytest.approx(lc.phi(dense[0], dense[1], k, k), rel=1e-3, abs=1e-6)
        assert p["phi"][str(k)]["control"]["q"] == pytest.approx(k / 32)
    assert "alike to φ" in p["phi"]["1"]["say"]["q"]
    one = ask(page, "spectrum", **{"run": run.id, "with": other.id, "m": "layers.1.q"})
    line = next(t for t in one["figure"]["data"] if t["name"] == f"run {other.id}")
    assert len(line["y"]) == 2 and f"run {other.id}: σ₁" in one["overSay"]
    both = ask(page, "microscope", **{"run": run.id, "with": other.id, "m": "layers.1.q", "page": "f", "seq": 1})
    assert {"W0", f"run {other.id}", "ΔW"} <= {t["name"] for t in both["figure"]["data"]}
    same = ask(page, "pair", **{"run": run.id, "with": run.id})
    assert set(same["phi"]["1"]["values"]["q"]) == {1.0}
    assert "no run" in ask(page, "pair", **{"run": run.id, "with": 999})["error"]


def test_the_control_is_what_draws_give() -> None:
    from lora_core.similar import alike, chance

    g = np.random.default_rng(3)
    spans = [np.linalg.qr(g.standard_normal((60, 4)))[0] for _ in range(101)]
    found = [alike(spans[i], spans[i + 1])[3] for i in range(100)]
    mean, high = chance(60, 4)
    assert np.mean(found) == pytest.approx(mean, rel=0.1) and np.mean(np.array(found) > high) < 0.15
    with pytest.raises(lc.UserError, match="cannot be compared"):
        alike(spans[0], spans[0][:50])
