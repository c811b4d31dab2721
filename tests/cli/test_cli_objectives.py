"""The command line with the three objectives: a classifier and pairs, from rows to an adapter and what it is worth."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from app.runs.run import RunRequest, command_line
from lora_core.errors import UserError
from lora_core.home import read_json
from tests.cli_kit import Call, only_json, wrong
from tests.model_folder import tiny_bert

WORDS = {"good": "excellent", "bad": "amused"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    file = tmp_path / "labelled.tsv"
    file.write_text("".join(f"{word} food number {i} is {word}\t{label}\n" for i in range(30)
                            for label, word in WORDS.items()))  # fmt: skip
    return file


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"number {i}", "chosen": f"{i}", "rejected": f"Certainly! {i}"} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def classify(model: Path, data: Path, *more: object) -> tuple[object, ...]:
    return ("train", "--model", model, "--data", data, "--steps", 30, "--batch-size", 8, "--lr", 0.02, *more)


def test_a_classifier(call: Call, bert: Path, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    status, printed, said = call(*classify(bert, labelled, "--out", out, "--json"))
    value = only_json(printed)
    assert status == 0, said
    assert value["objective"] == "classify" and value["status"] == "done" and value["score"]["name"] == "accuracy"
    assert value["accuracy_after"] > max(0.8, value["accuracy_before"])
    assert value["loss_after"] < value["loss_before"] and abs(value["loss_before"] - math.log(2)) < 1
    assert "generat" not in said
    assert read_json(out / "lora_lab.json")["info"]["labels"] == ["bad", "good"]


def test_what_a_saved_classifier_is_worth(call: Call, bert: Path, labelled: Path, tmp_path: Path) -> None:
    out, merged = tmp_path / "adapter", tmp_path / "merged"
    call(*classify(bert, labelled, "--out", out))
    texts = [f"{word} food number 99 is {word}" for word in WORDS.values()]
    _, printed, _ = call("compare", out, *(w for t in texts for w in ("--prompt", t)), "--json")
    value = only_json(printed)
    assert [o["prompt"] for o in value["outputs"]] == texts and value["labels"] == ["bad", "good"]
    assert [o["adapted"] for o in value["outputs"]] == list(WORDS)
    assert {o["base"] for o in value["outputs"]} <= set(WORDS)
    _, printed, _ = call("eval", out, "--data", labelled, "--json")
    value = only_json(printed)
    assert value["objective"] == "classify" and value["adapted"]["accuracy"] > 0.9 > value["base"]["accuracy"]
    assert value["adapted"]["loss"] < value["base"]["loss"] and value["rows"] == 60
    status, printed, _ = call("eval", out, "--data", labelled)
    assert status == 0 and "accuracy" in printed and "60 held-out rows" in printed
    status, printed, _ = call("spectra", out, "--base", bert, "--json")
    assert status == 0 and all(m["relative_norm"] > 0 for m in only_json(printed)["matrices"])
    status, printed, _ = call("merge", out, "--out", merged, "--json")
    assert status == 0 and only_json(printed)["max_error"] < 1e-4


def test_a_decoder_can_classify_when_told_to(call: Call, tiny: Path, labelled: Path) -> None:
    status, printed, said = call(*classify(tiny, labelled, "--objective", "classify", "--json"))
    value = only_json(printed)
    assert status == 0, said
    assert value["objective"] == "classify" and value["accuracy_after"] is not None
    status, printed, said = call(*classify(tiny, labelled, "--steps", 2, "--json"))
    assert only_json(printed)["objective"] == "lm"


def test_pairs(call: Call, tiny: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    status, printed, said = call("train", "--model", tiny, "--data", pairs, "--steps", 12, "--lr", 0.03, "--beta", 1,
                                 "--targets", "q,v,o,up,down", "--out", out, "--json")  # fmt: skip
    value = only_json(printed)
    assert status == 0, said
    assert value["objective"] == "preference" and value["loss_before"] == pytest.approx(math.log(2), abs=1e-6)
    assert value["loss_after"] < value["loss_before"] and "accuracy_before" not in value
    assert value["score"]["name"] == "preferred" and value["score"]["base"]["preferred"] == 0.5
    assert value["score"]["adapted"]["preferred"] > 0.9 and value["score"]["adapted"]["margin"] > 0
    _, printed, _ = call("eval", out, "--data", pairs, "--score-rows", 2, "--json")
    value = only_json(printed)
    assert value["objective"] == "preference" and value["adapted"]["preferred"] > 0.9
    assert set(value["base"]) == {"loss", "preferred", "margin", "rows", "score"} and "closer" in value["base"]["score"]
    _, printed, _ = call("compare", out, "--prompt", "number 7", "--max-new-tokens", 4, "--json")
    assert set(only_json(printed)["outputs"][0]) == {"prompt", "base", "adapted"}


def test_what_cannot_be_trained_so(call: Call, bert: Path, tiny: Path, labelled: Path, pairs: Path, rows: Path) -> None:
    train = ("train", "--model", tiny, "--steps", 2, "--data")
    wrong(call(*train, rows, "--objective", "classifly"), "did you mean 'classify'")
    wrong(call(*train, rows, "--objective", "preference"), "line 1: no rejected answer")
    wrong(call(*train, labelled, "--objective", "classify", "--template", "{prompt}:"), "leave the template out")
    writes = call("train", "--model", bert, "--steps", 2, "--data", labelled, "--objective", "lm")
    wrong(writes, "is an encoder, which writes no text")
    wrong(call("train", "--model", bert, "--steps", 2, "--task", "plain"), "different completions")
    wrong(call(*train, pairs, "--beta", 0), "beta is 0")
    half = {"prompt": "a", "chosen": "b"}
    for bad, words in (({"chosen": "a"}, "no prompt"), (half, "no rejected"), (half | {"rejected": " "}, "no rejected"),
                       (half | {"rejected": " b"}, "chosen and rejected are the same"),
                       (half | {"rejected": 3}, "rejected must be text, this is a number")):  # fmt: skip
        pairs.write_text(json.dumps(bad) + "\n")
        wrong(call(*train, pairs), f"line 1: {words}")
    assert only_json(call("runs", "list", "--json")[1])["runs"] == []


def test_the_command_of_a_run_names_what_is_not_as_usual() -> None:
    request = RunRequest(model="m", task="plain", spec={"full": ["head"], "dora": True, "mask": 0.5},
                         config={"beta": 0.3}, objective="preference")  # fmt: skip
    command = command_line(request)
    for words in ("--objective preference", "--beta 0.3", "--full head", "--dora", "--mask 0.5"):
        assert words in command
    assert RunRequest.from_dict(request.to_dict()) == request
    with pytest.raises(UserError, match="no objective 'x'; possible: auto lm classify preference"):
        RunRequest(model="m", task="plain", objective="x")
