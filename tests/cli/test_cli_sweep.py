"""`lora-lab sweep` on a tiny model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import lora_core as lc
from tests.cli_kit import Call, only_json, wrong


def test_a_sweep_is_one_table(call: Call, tiny: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("sweep", "--model", tiny, "--data", rows, "--ranks", "1,2", "--targets", "q,v", "--targets", "down",
             "--steps", 3, "--batch-size", 4, "--lr", 0.05, "--out", out)  # fmt: skip
    status, text, _ = call(*words, "--json")
    assert status == 0
    value = only_json(text)
    got = {(tuple(r["targets"]), r["rank"]): r for r in value["runs"]}
    assert list(got) == [(("q", "v"), 1), (("q", "v"), 2), (("down",), 1), (("down",), 2)]
    for r in value["runs"]:
        assert r["loss_after"] < r["loss_before"] and r["reason"] == "done" and r["train_s"] > 0
        assert lc.read_adapter(r["adapter"]).spec == lc.LoraSpec(targets=tuple(r["targets"]), rank=r["rank"])
    # the same as a run of its own
    status, text, _ = call("train", "--model", tiny, "--data", rows, "--rank", 2, "--steps", 3, "--batch-size", 4,
                           "--lr", 0.05, "--json")  # fmt: skip
    alone = only_json(text)
    assert got[("q", "v"), 2]["loss_after"] == pytest.approx(alone["loss_after"], rel=1e-4)
    assert got[("q", "v"), 2]["trainable"] == alone["trainable"]
    status, text, _ = call(*words)
    assert status == 0 and text.splitlines()[0].split()[:2] == ["matrices", "rank"] and len(text.splitlines()) == 5


@pytest.mark.parametrize("words", [("train",), ("sweep", "--ranks", "1,2")])
def test_without_held_out_rows_nothing_is_measured(call: Call, tiny: Path, rows: Path, words: tuple[str, ...]) -> None:
    for json in ((), ("--json",)):
        status, text, err = call(*words, "--model", tiny, "--data", rows, "--steps", 2, "--eval-rows", 0, *json)
        assert status == 0, err
        assert "held-out loss" not in err
    value = only_json(text)
    for run in value.get("runs", [value]):
        assert run["loss_before"] is None and run["loss_after"] is None and run.get("score") is None


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--ranks", "1,x"), "ranks are whole numbers"),
        (("--ranks", "99"), "the largest rank possible"),
        (("--engine", "rya"), "did you mean 'ray'"),
        (("--targets", "qq"), "no matrix 'qq'"),
        (("--task", "pirate"), "--task and --data are both given"),
    ],
)
def test_what_cannot_be_swept(call: Call, tiny: Path, rows: Path, more: tuple[str, ...], says: str) -> None:
    wrong(call("sweep", "--model", tiny, "--data", rows, "--steps", 1, *more), says)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (pip install '.[cluster]')")
def test_on_a_ray_cluster(call: Call, tiny: Path, rows: Path) -> None:
    words = ("sweep", "--model", tiny, "--data", rows, "--ranks", "1,2", "--steps", 2, "--json")
    here, there = (only_json(call(*words, "--engine", e)[1])["runs"] for e in ("local", "ray"))
    assert [r["loss_after"] for r in there] == pytest.approx([r["loss_after"] for r in here], rel=1e-4)


def test_without_ray_it_says_so(call: Call, tiny: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    wrong(call("sweep", "--model", tiny, "--data", rows, "--steps", 1, "--engine", "ray"), "needs Ray")
