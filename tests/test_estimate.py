"""The time of a run, foretold: it follows the work, and it learns from what came."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny import tiny
from tokenizer_fixture import tiny_tokenizer

import lora_core as lc
from lora_core import estimate as est
from lora_core import fast
from lora_core.objective import CausalLM, batches_of
from lora_core.tasks import Row


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_LAB_HOME", str(tmp_path))
    monkeypatch.setattr("lora_core.machine.gemm_rate", lambda *_: 1e9)
    return tmp_path


def test_it_follows_the_work() -> None:
    model, spec = tiny("llama"), lc.LoraSpec(rank=4)
    one = est.seconds_per_step(model, spec, tokens=500)
    flops = lc.budget(model, spec, tokens=500).step_flops
    fixed = 4 * sum(s.out * s.in_ for s in lc.find_sites(model)) * est.STREAM
    assert one == pytest.approx(est.OVERHEAD * (flops + fixed) / 1e9)
    two = est.seconds_per_step(model, spec, tokens=1000, labelled=500)
    assert two - one == pytest.approx(est.OVERHEAD * flops / 1e9), "as much again for as many tokens again"
    upper = lc.LoraSpec(rank=4, layers=(1,))
    assert est.seconds_per_step(model, upper, tokens=500) < one, "nothing flows back below the lowest adapted layer"
    assert est.seconds_per_step(model, lc.LoraSpec(rank=16), tokens=500) > one


@pytest.mark.parametrize(("quicker", "share"), [(1.2, 1 / 1.2), (6.4, est.LEAST)])
def test_bfloat16_is_foretold_to_save_no_more_than_it_does(monkeypatch: pytest.MonkeyPatch, quicker: float,
                                                           share: float) -> None:  # fmt: skip
    monkeypatch.setattr("lora_core.machine.gemm_rate", lambda d, *_: 1e9 * (quicker if d == "bfloat16" else 1))
    half, single = (est.seconds_per_step(tiny("llama", dtype=d), lc.LoraSpec(rank=4), tokens=500)
                    for d in (torch.bfloat16, torch.float32))  # fmt: skip
    assert half == pytest.approx(share * single)


def test_a_run_is_steps_and_measurements() -> None:
    model, task = tiny("llama"), lc.load_task("pirate", train=40, test=12)
    config = lc.TrainConfig(steps=10, batch_size=4, eval_rows=8)
    e = est.estimate(model, lc.LoraSpec(rank=4), task, config, tiny_tokenizer())
    assert e.total_s == pytest.approx(10 * e.step_s + e.evals * e.eval_s)
    assert e.evals == len(config.eval_steps) + 1 and 0 < e.labelled < e.tokens
    double = est.estimate(
        model, lc.LoraSpec(rank=4), task, lc.TrainConfig(steps=10, batch_size=8, eval_rows=8), tiny_tokenizer()
    )
    assert 1.1 * e.step_s < double.step_s < 2 * e.step_s and double.eval_s == pytest.approx(e.eval_s, rel=0.01)
    assert est.estimate(model, lc.LoraSpec(), task, lc.TrainConfig(eval_rows=0), tiny_tokenizer()).evals == 0


def test_what_rows_share_is_counted_once() -> None:
    """As many tokens as training computes, for a model that shares beginnings and for one that does not."""
    rows = tuple(Row("name : The Punter | food : " + "fish" * (i // 6), "a place " + "by the river " * (i % 6) + "x")
                 for i in range(48))  # fmt: skip
    task = dataclasses.replace(lc.load_task("pirate", train=1, test=1), train=rows, test=())
    config = lc.TrainConfig(steps=2, batch_size=8)
    for kind in ("llama", "gpt2"):
        model = tiny(kind)
        objective = CausalLM(model, tiny_tokenizer(), task.template)
        order, items = batches_of(objective, objective.encode(rows), 8, 0), objective.encode(rows)
        counts = []
        for _ in range(5):
            batch = objective.batch([items[i] for i in next(order)])
            at = (batch.labels[:, 1:].reshape(-1) != -100).nonzero().squeeze(1)
            tree = fast.tree_of(batch.ids[:, :-1], at)
            assert tree is not None
            counts.append(len(tree.first) if kind == "llama" else batch.tokens)
        e = est.estimate(model, lc.LoraSpec(rank=4), task, config, tiny_tokenizer())
        assert e.tokens == pytest.approx(sum(counts) / 5, rel=0.15)
        assert e.tokens < 0.8 * batch.tokens or kind == "gpt2"


def test_it_learns_from_what_came_and_keeps_it_by_dtype(home: Path) -> None:
    model, spec = tiny("llama"), lc.LoraSpec(rank=4)
    before = est.seconds_per_step(model, spec, tokens=500)
    est.learn(model, spec, steps=10, tokens=5000, train_s=30 * before)  # three times slower than foretold
    assert est.seconds_per_step(model, spec, tokens=500) == pytest.approx(3 * before)
    assert (home / "speed.json").exists()
    est.learn(model, spec, steps=10, tokens=5000, train_s=30 * before)
    assert est.seconds_per_step(model, spec, tokens=500) == pytest.approx(3 * before), "right already: nothing moves"
    other = tiny("llama", dtype=torch.bfloat16)
    assert est.seconds_per_step(other, spec, tokens=500) == pytest.approx(before), "another dtype has its own factor"


@pytest.mark.parametrize("text", ["{", "[1]", '{"x": "y"}', '{"k": null}'])
def test_a_damaged_memory_is_forgotten(home: Path, text: str) -> None:
    model, spec = tiny("llama"), lc.LoraSpec(rank=4)
    before = est.seconds_per_step(model, spec, tokens=500)
    (home / "speed.json").write_text(text)
    assert est.seconds_per_step(model, spec, tokens=500) == before
    est.learn(model, spec, steps=10, tokens=5000, train_s=20 * before)
    assert est.seconds_per_step(model, spec, tokens=500) == pytest.approx(2 * before)


def test_too_short_a_run_teaches_nothing(home: Path) -> None:
    est.learn(tiny("llama"), lc.LoraSpec(), steps=2, tokens=100, train_s=1.0)
    assert not (home / "speed.json").exists()
