"""The command line on the real default model, from training to a merged folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app import cli

pytestmark = pytest.mark.timeout(900)  # a real training beside whatever else has the processors


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    status = cli.run([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out)


@pytest.fixture
def runs_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs go to a folder of the test's own; the models stay where they are."""
    monkeypatch.setattr("app.runs.store.lab_home", lambda: tmp_path)


def main_job(capsys: pytest.CaptureFixture[str], folder: Path, *how: object) -> dict[str, Any]:
    """Train, compare, measure, look inside, merge; gives what `train` said."""
    adapter = folder / "adapter"
    trained = answer(capsys, "train", "--task", "restaurant", "--out", adapter, *how)
    assert trained["trainable"] == 460_800 and trained["adapter"] == str(adapter)
    prompt = "name : The Copper Kettle | food : Italian | area : riverside"
    (output,) = answer(capsys, "compare", adapter, "--prompt", prompt, "--max-new-tokens", 30)["outputs"]
    assert output["prompt"] == prompt and output["base"] != output["adapted"] != ""
    found = answer(capsys, "spectra", adapter)["matrices"]
    assert len(found) == 60 and all(len(m["singular_values"]) == 8 and m["norm"] > 0 for m in found)
    assert {(m["target"], m["layer"]) for m in found} == {(t, i) for t in "qv" for i in range(30)}
    merged = answer(capsys, "merge", adapter, "--out", folder / "merged")
    assert merged["max_error"] < 1e-3  # logits are up to some tens
    return trained


@pytest.mark.usefixtures("runs_elsewhere")
def test_a_few_steps(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trained = main_job(capsys, tmp_path, "--steps", 3, "--batch-size", 2, "--eval-rows", 8, "--lr", 2e-3)
    assert trained["loss_after"] < trained["loss_before"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("runs_elsewhere")
def test_the_default_training(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trained = main_job(capsys, tmp_path)
    assert trained["loss_after"] < trained["loss_before"] - 1.0
    assert trained["score"]["adapted"]["BLEU"] > trained["score"]["base"]["BLEU"] + 10
    measured = answer(capsys, "eval", tmp_path / "adapter", "--task", "restaurant", "--score-rows", 8)
    assert measured["adapted"]["loss"] < measured["base"]["loss"] - 1.0
