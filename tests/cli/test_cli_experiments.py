"""`lora-lab experiment` on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lora_core as lc
from lora_core.experiments import NAMES
from tests.cli_kit import Call, only_json, wrong
from tests.model_folder import tiny_bert


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("models") / "bert")


def test_the_list_is_all_of_them_with_stored_verdicts(call: Call) -> None:
    status, out, _ = call("experiment", "list", "--json")
    assert status == 0
    found = {e["name"]: e for e in only_json(out)["experiments"]}
    assert list(found) == list(NAMES)
    for name, e in found.items():
        stored = lc.stored_result(name)
        assert e["verdict"] == (stored.verdict if stored else None) and e["here"] is None
        assert e["question"] and e["section"] and len(e["choices"]) == 3
        if stored:
            assert (e["quick"], e["command"], e["sentence"]) == (stored.quick, stored.command, stored.sentence)
    status, out, _ = call("experiment", "list")
    assert status == 0 and len(out.splitlines()) == len(NAMES) + 1


def test_one_is_run_kept_shown_and_written(call: Call, tiny: Path, bert: Path, tmp_path: Path) -> None:
    words = ("experiment", "run", "objective", "--quick", "--steps", 2, "--writer", tiny, "--encoder", bert)
    status, out, err = call(*words, "--out", tmp_path / "made.json", "--json")
    assert status == 0, err
    value = only_json(out)
    assert {"name", "claim", "verdict", "rows", "sentence", "choices", "paper", "machine", "seconds"} <= set(value)
    assert len(value["rows"]) == 9 and value["quick"] and value["seeds"] == [0, 1, 2]
    assert str(tiny) in value["command"] and "--steps 2" in value["command"]
    made: Any = lc.Result.from_dict(__import__("json").loads((tmp_path / "made.json").read_text()))
    assert made.verdict == value["verdict"]
    status, out, _ = call("experiment", "show", "objective", "--here")
    assert status == 0 and f"{value['verdict']} (quick): {value['sentence']}" in out
    here = {e["name"]: e["here"] for e in only_json(call("experiment", "list", "--json")[1])["experiments"]}
    assert here["objective"]["verdict"] == value["verdict"] and here["rank"] is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run", "rnk"), "did you mean 'rank'"),
        (("show", "storge"), "did you mean 'storage'"),
        (("run", "rank", "--seeds", "1,x"), "seeds are different whole numbers"),
        (("run", "rank", "--seeds", "1,1"), "seeds are different whole numbers"),
        (("run", "rank", "--steps", "0"), "steps is 0"),
        (("show", "rank", "--here"), "there is no result of 'rank' yet"),
    ],
)
def test_what_cannot_be_run(call: Call, words: tuple[str, ...], says: str) -> None:
    wrong(call("experiment", *words), says)
