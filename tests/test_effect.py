"""What a training did, and why nothing is to be seen: planted cases for each reason, and measures against an oracle."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_core as lc
from app.runs.events import plain
from lora_core.changed import changed_share, sizes
from lora_core.effect import Effect, percent
from lora_core.objective import CausalLM
from lora_core.tasks import Row, Task
from tests.model_folder import tiny_llama

SEEN = Effect(delta=2.0, W0=500.0, hit=60, both_zero=False, gradient=1.5, steps=60, rates=0.03, lr=1e-3, scaling=2.0,
              rank=8, changed=0.61, counted=1234, thing="token", loss_before=2.95, loss_after=0.63, train_before=2.8,
              train_after=0.7, diverged=False)  # fmt: skip
STILL = replace(SEEN, delta=1e-6, changed=0.0, loss_after=2.951, train_after=2.8)

PLAIN: dict[str, Any] = {"about": "", "score_name": "", "scorer": lambda *_: {}, "template": "{prompt} ->"}


# ---- the rule
@pytest.mark.parametrize(("effect", "reason", "words"), [
    (SEEN, "", ""),
    (replace(STILL, lr=1e-8, rates=3e-7), "rate too small", "rate 1e-08 is too small; try 0.001"),
    (replace(STILL, steps=2, rates=1e-3), "too few steps", "2 steps are too few; try 60"),
    (replace(STILL, steps=30, lr=1.2e-4, rates=1e-3), "rate too small", "try 0.001"),
    (replace(STILL, hit=0, delta=0.0, W0=0.0), "hits nothing", "choose others, such as q and v"),
    (replace(STILL, both_zero=True, gradient=0.0), "both factors zero", "begin with a random A"),
    (replace(STILL, gradient=0.0), "no gradient", "No gradient reached the adapted matrices"),
    (replace(STILL, scaling=1e-4), "scaling too small", "raise α, to 16 say"),
    (STILL, "little to gain", "adapt more matrices"),
    (replace(SEEN, diverged=True, lr=0.1), "diverged", "learning rate 0.1 is too large; try 0.01"),
    (replace(STILL, diverged=True, steps=1, lr=5.0), "diverged", "try 0.5"),
    (replace(SEEN, loss_after=7.0, lr=0.1, train_after=6.0), "rate too large", "learning rate 0.1 is too large"),
    (replace(SEEN, loss_after=2.95, delta=900.0, lr=0.1), "rate too large", "It went astray"),
    (replace(SEEN, loss_after=3.5, train_after=0.2), "learnt by heart", "fewer steps or more rows"),
])  # fmt: skip
def test_each_reason(effect: Effect, reason: str, words: str) -> None:
    assert effect.reason == reason and words in effect.advice and bool(effect.advice) == bool(reason)
    assert effect.advice in effect.sentence()
    assert effect.sentence().startswith("No visible effect") == (not effect.visible)
    assert Effect.from_dict(effect.to_dict()) == effect and effect.to_dict()["reason"] == reason


def test_what_is_not_finite_survives_json() -> None:
    wild = replace(SEEN, delta=math.inf, loss_after=math.nan, diverged=True)
    kept = Effect.from_dict(plain(wild.to_dict()))
    assert kept.delta == math.inf and kept.loss_after is None and kept.reason == "diverged"
    assert "‖ΔW‖ is no finite number" in kept.sentence() and "It diverged" in kept.sentence()


def test_what_stands_beside_the_matrices_changes_none_of_them() -> None:
    beside = replace(SEEN, delta=0.0, W0=0.0)  # a prefix, or adapter layers
    assert "to 0.63: every W0 is as it was, and 61 % of 1,234 held-out tokens have another" in beside.sentence()


def test_what_is_visible() -> None:
    assert replace(STILL, changed=0.01).visible and replace(STILL, loss_after=2.92).visible
    assert not replace(STILL, changed=0.0099, loss_after=2.94).visible
    assert replace(STILL, changed=None, counted=0, loss_before=None, loss_after=None).visible is None
    assert replace(STILL, delta=0.0, changed=None, loss_before=None).visible is False


def test_the_sentence_is_made_from_the_numbers() -> None:
    assert SEEN.sentence(score=("BLEU", "1", "38"), took="3 min") == (
        "60 steps in 3 min took the held-out loss from 2.95 to 0.63 and BLEU from 1 to 38: ‖ΔW‖ is 0.40 % of ‖W0‖, and "
        "61 % of 1,234 held-out tokens have another most probable word.")  # fmt: skip
    assert STILL.sentence().startswith("No visible effect after 60 steps, held-out loss 2.95 before and 2.95 after: ")
    assert "No rows are held out" in replace(STILL, changed=None, loss_before=None).sentence()
    assert "‖ΔW‖ is 6.0 times ‖W0‖" in replace(SEEN, delta=3000.0).sentence()
    assert [percent(x) for x in (0.0, 0.61, 0.0042, 1.3e-7)] == ["0 %", "61 %", "0.42 %", "0.000013 %"]


# ---- the measures
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny", initializer_range=0.1)


@pytest.fixture(scope="module")
def task() -> Task:
    rows = [Row(f"a {c} {s}", f"It is {c}.") for c in ("red", "blue", "green") for s in ("box", "ball", "hat")]
    return Task(name="shapes", train=tuple(rows[:6]), test=tuple(rows[6:]), **PLAIN)


def run(folder: Path, task: Task, spec: dict[str, Any] | None = None, zero: bool = False, **config: Any) -> Effect:
    """Train a tiny model and say what that did."""
    model, tokenizer = lc.load_model(str(folder), dtype="float32")
    every = ("q", "k", "v", "o", "gate", "up", "down")
    adapter = lc.attach(model, lc.LoraSpec(**{"targets": every, "rank": 4, "alpha": 8, **(spec or {})}))
    if zero:
        with torch.no_grad():
            for p in adapter.parameters():
                p.zero_()
    settings = lc.TrainConfig(**{"steps": 30, "batch_size": 4, "lr": 1e-2, **config})
    events = list(lc.train(adapter, task, settings, tokenizer=tokenizer))
    return lc.measure_effect(adapter, task, settings, events, tokenizer=tokenizer)


@pytest.mark.parametrize(("more", "reason"), [
    ({}, ""),
    ({"lr": 1e-8}, "rate too small"),
    ({"steps": 1, "lr": 1e-4}, "too few steps"),
    ({"zero": True}, "both factors zero"),
    ({"spec": {"alpha": 1e-6}, "lr": 1e-3}, "scaling too small"),
    ({"spec": {"alpha": 1e38}, "lr": 1e3}, "diverged"),
    ({"lr": 10.0, "steps": 12, "schedule": "constant"}, "rate too large"),
])  # fmt: skip
def test_planted_causes_are_named(folder: Path, task: Task, more: dict[str, Any], reason: str) -> None:
    found = run(folder, task, **more)
    assert found.reason == reason, found
    if not reason:
        assert found.visible and found.changed and found.changed > 0.2 and found.gain and found.gain > 0.5


def test_a_matrix_that_the_loss_does_not_depend_on(folder: Path) -> None:
    """Rows of one token: attention has one place to look at, so that q's gradient is zero."""
    model, tokenizer = lc.load_model(str(folder), dtype="float32")
    rows = tuple(Row("", w) for w in ("a", "b", "c"))
    task = Task(name="one", train=rows, test=rows, **{**PLAIN, "template": "{prompt}"})
    adapter = lc.attach(model, lc.LoraSpec(targets=("q",)))
    objective = CausalLM(model, tokenizer, task.template)
    assert max(map(len, objective.encode(rows))) <= 2, "one token and the end of text"
    config = lc.TrainConfig(steps=5, lr=1e-2, max_tokens=2)
    events = list(lc.train(adapter, task, config, objective=objective, tokenizer=tokenizer))
    found = lc.measure_effect(adapter, task, config, events, tokenizer=tokenizer)
    assert found.reason == "no gradient", found.gradient


def test_sizes_and_changed_words_against_dense_arithmetic(folder: Path, task: Task) -> None:
    model, tokenizer = lc.load_model(str(folder), dtype="float32")
    adapter = lc.attach(model, lc.LoraSpec(targets=("q", "down", "norm"), rank=3))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.1)
    adapter.enable(False)
    objective = CausalLM(model, tokenizer, task.template)
    share, counted = changed_share(adapter, objective, task.test)
    assert not adapter.on, "the adapter is left as it was"

    base = {n: p.double().clone() for n, p in model.named_parameters() if ".lora" not in n}
    dense = {k: d.dense().double() for k, d in adapter.deltas().items()}
    copies = {k: c.detach().double() - base[k] for k, c in adapter.copies.items()}
    delta = sum(float((m * m).sum()) for m in (*dense.values(), *copies.values())) ** 0.5
    W0 = sum(float((base[n] ** 2).sum()) for n in (*(f"{k}.weight" for k in dense), *copies)) ** 0.5
    assert sizes(adapter) == pytest.approx((delta, W0), rel=1e-5)

    same = total = 0
    for row in task.test:  # each by itself, through transformers' own forward
        (item,) = objective.encode([row])
        ids = torch.tensor([item.ids])
        picks = []
        for on in (False, True):
            adapter.enable(on)
            with torch.no_grad():
                picks.append(model(input_ids=ids).logits[0, item.start - 1 : -1].argmax(-1))
        same, total = same + int((picks[0] == picks[1]).sum()), total + len(picks[0])
    assert counted == total and share == pytest.approx((total - same) / total) and 0 < (share or 0) < 1


def test_a_classifier_and_a_preference(folder: Path, task: Task) -> None:
    model, tokenizer = lc.load_model(str(folder), dtype="float32")
    rows = tuple(replace(r, rejected="It is not.") for r in task.train)
    pairs = replace(task, train=rows, test=rows)
    adapter = lc.attach(model, lc.LoraSpec(rank=4))
    config = lc.TrainConfig(steps=20, batch_size=2, lr=2e-2)
    events = list(lc.train(adapter, pairs, config, tokenizer=tokenizer))
    found = lc.measure_effect(adapter, pairs, config, events, tokenizer=tokenizer)
    assert found.thing == "token" and found.counted > 6 and found.visible

    reader, tokenizer = lc.load_model(str(folder), dtype="float32", labels=("x", "y"))
    texts = replace(task, train=tuple(Row(r.prompt, "xy"[i % 2]) for i, r in enumerate(task.train)), test=())
    texts = replace(texts, test=texts.train)
    adapter = lc.attach(reader, lc.LoraSpec(rank=4, full=("head",)))
    events = list(lc.train(adapter, texts, config, tokenizer=tokenizer))
    found = lc.measure_effect(adapter, texts, config, events, tokenizer=tokenizer)
    assert found.thing == "text" and found.counted == 6 and "most probable label" in found.sentence()
