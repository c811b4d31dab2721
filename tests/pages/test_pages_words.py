"""The sentences on the page: right about the numbers that they are made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.pages import words
from app.runs.run import Run, RunRequest


def run(**more: Any) -> Run:
    request = more.pop("request", RunRequest(model="m", task="pirate", config={"steps": 60}))
    values: dict[str, Any] = {"id": 14, "status": "done", "request": request, "folder": Path("."), "created": 0.0}
    values |= {"step": 60, "steps": 60, "base_loss": 3.14, "loss": 1.67, "result": {"train_s": 130.0}}
    return Run(**{**values, **more})


def test_what_a_run_did() -> None:
    text = words.training(run())
    assert text == ("60 steps in 2 min 10 s took the held-out loss from 3.14 to 1.67: "
                    "each held-out token became 4.3 times as likely.")  # fmt: skip
    assert words.training(run(status="stopped", step=1)).startswith("Stopped early, 1 step in")
    assert "2.7 times less likely" in words.training(run(base_loss=2.0, loss=3.0))
    assert "became more than 10,000 times as likely" in words.training(run(base_loss=14.0, loss=1.0))
    assert "as likely as before" in words.training(run(base_loss=2.0, loss=2.001))
    labels, pairs = ({"objective": name} for name in ("classify", "preference"))
    assert "each held-out label became 4.3 times as likely" in words.training(run(result=labels))
    assert words.training(run(base_loss=0.693, loss=0.2, result=pairs)) == (
        "60 steps took the held-out loss from 0.69 to 0.20, that of pairs of answers; without the adapter it is log 2, "
        "0.69.")  # fmt: skip
    assert words.training(run(loss=None)) == "" and words.training(run(step=0)) == ""


def test_what_a_run_did_where_it_was_measured() -> None:
    from tests.test_effect import SEEN, STILL

    score = {"name": "BLEU", "base": {"BLEU": 0.7}, "adapted": {"BLEU": 38.1}, "rows": 16}
    text = words.training(run(result={"train_s": 130.0, "effect": SEEN.to_dict()}, score=score))
    assert text.startswith("60 steps in 2 min 10 s took the held-out loss from 2.95 to 0.63 and BLEU from 1 to 38: ")
    assert "‖ΔW‖ is 0.40 % of ‖W0‖, and 61 % of 1,234 held-out tokens" in text
    still = words.training(run(status="stopped", result={"effect": {**STILL.to_dict(), "lr": 1e-8}}))
    assert still.startswith("Stopped early: No visible effect") and still.endswith("is too small; try 0.001.")


@pytest.mark.parametrize(("more", "text"), [
    ({"status": "queued", "position": 1}, "run 14 waits for its turn"),
    ({"status": "queued", "position": 3}, "run 14 waits: place 3 in the queue"),
    ({"status": "running", "step": 12}, "run 14 is training: step 12 of 60"),
    ({"status": "done"}, "run 14: done"),
    ({"status": "stopped", "step": 7}, "run 14: stopped after step 7 of 60, adapter kept"),
    ({"status": "interrupted", "step": 7}, "run 14: interrupted after step 7 of 60"),
    ({"status": "failed"}, "run 14: failed"),
    ({"status": "diverged"}, "run 14: diverged"),
    ({"recorded": True, "id": 0}, "recorded run: 60 steps, made by LoRA Lab's own command"),
])  # fmt: skip
def test_the_live_line(more: dict[str, Any], text: str) -> None:
    assert words.status(run(**more), None) == text


def test_the_live_line_tells_the_stage() -> None:
    loading = run(status="running", step=0)
    assert words.status(loading, "loading smollm2-135m") == "run 14: loading smollm2-135m"
    assert words.status(run(status="running"), "scoring held-out examples") == "run 14: scoring held-out examples"


def test_a_run_beside_another() -> None:
    other = RunRequest(model="m", task="pirate", spec={"rank": 4}, config={"steps": 60})
    text = words.beside(run(), run(id=13, request=other, loss=1.70), "run 13")
    assert text == "Behind it: run 13, r 4 instead of 8; it ended at 1.70, 0.03 above."
    same = words.beside(run(), run(id=13, loss=1.67), "run 13")
    assert same.endswith("the same settings; it ended at 1.67, the same.")


def test_spectra_in_words() -> None:
    assert words.spectrum(3, 14, 16) == ("Three directions hold 90 % of this update; a random update of the same norm "
                                         "would need 14.")  # fmt: skip
    assert words.spectrum(1, 7, 8).startswith("One direction holds 90 %")
    assert words.spectrum(2, 2, 2).endswith("would need as many.")
    assert "only one direction" in words.spectrum(1, 1, 1)
    assert "has not moved" in words.spectrum(0, 0, 8)


def test_maps_in_words() -> None:
    values = {"q": [1.0, None, 4.0], "v": [2.0, 0.5, 2.0]}
    assert words.heat(values, "norm") == ("The largest update is in q of layer 2 (‖ΔW‖ = 4.00), 8.0 times the smallest "
                                          "(v of layer 1).")  # fmt: skip
    assert "v needs the fewest (1.5) and q the most (2.5)" in words.heat(values, "stable_rank")
    assert words.heat({"q": [0.0]}, "norm") == "No matrix has moved: every ΔW is zero."
    assert words.heat({}, "norm") == ""
    assert words.growth(values).startswith("ΔW is largest in q of layer 2, ‖ΔW‖ = 4.00")
    assert words.growth({"q": [0.0, 0.0]}).startswith("ΔW = 0")


@pytest.mark.parametrize(("x", "text"), [(0.0, "0"), (0.003124, "0.00312"), (1.666, "1.67"), (14.21, "14.2"),
                                         (5342.4, "5,342"), (99.96, "100")])  # fmt: skip
def test_numbers_have_three_digits(x: float, text: str) -> None:
    assert words.short(x) == text


@pytest.mark.parametrize(("s", "text"), [(8.4, "8 s"), (130, "2 min 10 s"), (120, "2 min"), (1570, "26 min"),
                                         (3900, "1 h 5 min")])  # fmt: skip
def test_times(s: float, text: str) -> None:
    assert words.duration(s) == text


def test_scores() -> None:
    bleu = {"name": "BLEU", "base": {"BLEU": 4.2}, "adapted": {"BLEU": 31.6}, "rows": 16}
    assert words.score(bleu) == {"name": "BLEU", "base": "4", "adapted": "32", "rows": 16}
    share = {"name": "accuracy", "base": {"accuracy": 0.5}, "adapted": {"accuracy": 0.94}, "rows": 16}
    assert words.score(share) == {"name": "accuracy", "base": "50 %", "adapted": "94 %", "rows": 16}
    assert words.score(None) is None and words.score({"name": "BLEU", "base": {}, "adapted": {}}) is None


def test_every_word_of_the_paper_is_one_line() -> None:
    for word, meaning in words.GLOSSARY:
        assert word and meaning and "\n" not in meaning and len(meaning) < 120
