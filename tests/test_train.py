"""The training loop: what it streams, what it keeps, and that its shortcuts change nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import FAMILIES, bits, filled, tiny
from tokenizer_fixture import tiny_tokenizer

import lora_core as lc
from lora_core.evaluate import mean_loss
from lora_core.objective import CausalLM, bucketed, endless
from lora_core.train import update_norms

TASK = lc.load_task("pirate", train=40, test=12)
FAST: dict[str, Any] = dict(steps=6, batch_size=4, lr=1e-2, eval_rows=8, max_tokens=48)


def run(adapter: lc.Adapter, **more: Any) -> list[lc.TrainEvent]:
    outer = {k: more.pop(k) for k in ("stop", "checkpoint") if k in more}
    return list(lc.train(adapter, TASK, lc.TrainConfig(**{**FAST, **more}), tokenizer=tiny_tokenizer(), **outer))


def fresh(family: str = "llama", seed: int = 0, **more: Any) -> lc.Adapter:
    return lc.attach(tiny(family), lc.LoraSpec(targets=("q", "v"), rank=4, alpha=8, **more), seed=seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_learns_and_leaves_the_base_alone(family: str) -> None:
    a = fresh(family)
    weights = bits(a.model)
    events = run(a, steps=30)
    kinds = [e.kind for e in events]
    assert kinds[0] == "base" and kinds[-1] == "end" and kinds.count("step") == 30
    base, end = events[0], events[-1]
    assert base.step == 0 and base.held_loss is not None and end.held_loss is not None
    assert end.held_loss < base.held_loss - 0.05 and end.reason == "done"
    assert [e.step for e in events if e.kind == "held"] == [10, 20, 30]
    assert all(torch.equal(v, weights[n]) for n, v in bits(a.model).items())
    assert all(p.grad is None for p in a.parameters()) and not a.model.training
    steps = [e for e in events if e.kind == "step"]
    assert [e.step for e in steps] == list(range(1, 31)) and steps[-1].tokens > 1000
    assert all(e.tokens_per_s and e.left_s is not None and e.grad_norm for e in steps) and steps[-1].left_s == 0
    norms = end.norms
    assert norms is not None and norms.keys() == a.sites.keys() and min(norms.values()) > 0
    assert end.to_dict()["reason"] == "done" and "lr" not in end.to_dict()


def test_the_same_seed_is_the_same_run_and_another_is_not() -> None:
    losses = [[e.loss for e in run(fresh(seed=s), seed=s) if e.kind == "step"] for s in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_naive_one(family: str) -> None:
    """Right padding without a mask and logits at labels alone give the loss of row after row with all logits."""
    model, tok = tiny(family, dtype=torch.float64), tiny_tokenizer()
    filled(lc.attach(model, lc.LoraSpec(rank=2)))
    objective = CausalLM(model, tok, TASK.template, 48)
    assert objective.split
    items = objective.encode(TASK.train[:7])
    batch = objective.batch(items)
    total, count = 0.0, 0
    for e in items:
        x = torch.tensor([e.ids])
        logp = F.log_softmax(model(x).logits[0, :-1], -1)
        total -= float(logp.detach().gather(1, x[0, 1:, None])[e.start - 1 :].sum())
        count += len(e.ids) - e.start
    assert batch.labelled == count and batch.tokens == sum(len(e.ids) for e in items)
    assert float(objective.loss(batch).detach()) == pytest.approx(total, rel=1e-9)
    objective.split = False
    assert float(objective.loss(batch).detach()) == pytest.approx(total, rel=1e-9)
    mean = mean_loss(objective, items, rows=3)
    assert mean == pytest.approx(total / count, rel=1e-9)


def test_a_model_that_scales_its_logits_is_not_split() -> None:
    from transformers import AutoModelForCausalLM, GraniteConfig

    config = GraniteConfig(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                           num_attention_heads=4, num_key_value_heads=4, logits_scaling=4.0)  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    assert not CausalLM(model, tiny_tokenizer(), TASK.template).split


def test_accumulation_is_the_same_step_as_one_large_batch() -> None:
    small, large = fresh(), fresh()
    a = run(small, batch_size=4, accumulate=1, steps=1, schedule="constant", warmup=0.0)
    rows = next(
        endless(
            [len(e.ids) for e in CausalLM(small.model, tiny_tokenizer(), TASK.template, 48).encode(TASK.train)], 4, 0
        )
    )
    assert len(rows) == 4 and a[1].kind == "step"
    # Two halves of the same four rows, weighted by their tokens, are the gradient of the four.
    objective = CausalLM(large.model, tiny_tokenizer(), TASK.template, 48)
    items = objective.encode([TASK.train[i] for i in rows])
    whole = objective.batch(items)
    (objective.loss(whole) / whole.labelled).backward()
    one = [p.grad.clone() for p in large.parameters() if p.grad is not None]
    for p in large.parameters():
        p.grad = None
    for half in (items[:1], items[1:]):
        (objective.loss(objective.batch(half)) / whole.labelled).backward()
    for g, p in zip(one, large.parameters()):
        torch.testing.assert_close(g, p.grad, rtol=1e-4, atol=1e-7)


def test_resume_is_bit_equal(tmp_path: Path) -> None:
    """Stopped after step 5 and gone on from there: the same losses, the same factors, to the bit."""
    whole = fresh(dropout=0.2)
    straight = [e.loss for e in run(whole, steps=9) if e.kind == "step"]
    file = tmp_path / "run.safetensors"
    count = iter(range(100))
    first = run(fresh(dropout=0.2), steps=9, checkpoint_every=2, checkpoint=file, stop=lambda: next(count) == 4)
    assert first[-1].reason == "stopped" and first[-1].step == 5 and file.exists()
    again = fresh(dropout=0.2, seed=7)  # what it starts from is in the checkpoint
    torch.manual_seed(99)
    second = run(again, steps=9, checkpoint_every=2, checkpoint=file)
    assert [e.loss for e in second if e.kind == "step"] == straight[5:]
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters()))
    assert second[0].kind == "base" and second[0].held_loss == first[0].held_loss
    assert not file.exists(), "a finished run leaves no checkpoint"


def test_a_checkpoint_of_other_settings_or_a_torn_one_is_refused(tmp_path: Path) -> None:
    file, count = tmp_path / "c", iter(range(9))
    run(fresh(), checkpoint_every=1, checkpoint=file, stop=lambda: next(count) == 1)
    with pytest.raises(lc.UserError, match="another lr"):
        run(fresh(), checkpoint=file, lr=1e-3)
    file.write_bytes(file.read_bytes()[:100])
    assert [e.step for e in run(fresh(), checkpoint=file) if e.kind == "step"][0] == 2, "from the one before"
    for torn in (file, file.with_name("before-c")):
        torn.write_bytes(b"torn")
    with pytest.raises(lc.UserError, match="cannot be read: it is torn"):
        run(fresh(), checkpoint=file)


def test_divergence_stops_with_a_reason_and_keeps_the_last_good_factors() -> None:
    a = fresh()
    events = run(a, steps=40, lr=1e6, clip=0.0, schedule="constant", warmup=0.0, eval_rows=0)
    end = events[-1]
    assert end.reason == "diverged"
    assert "learning rate" in (end.message or "") and end.step < 40
    assert all(p.isfinite().all() for p in a.parameters())
    assert all(math.isfinite(e.loss) for e in events if e.kind == "step" and e.loss is not None)


def test_stop_keeps_the_adapter_and_says_so() -> None:
    a, count = fresh(), iter(range(99))
    events = run(a, steps=50, stop=lambda: next(count) == 2)
    assert events[-1].reason == "stopped" and events[-1].step == 3 and events[-2].kind == "held"
    assert events[-1].held_loss is not None and max(update_norms(a).values()) > 0


def test_an_abandoned_generator_leaves_the_model_as_it_was() -> None:
    a = fresh()
    stream = lc.train(a, TASK, lc.TrainConfig(**FAST), tokenizer=tiny_tokenizer())
    for e in stream:
        if e.kind == "step":
            break
    stream.close()  # pyright: ignore
    assert not a.model.training and all(p.grad is None for p in a.parameters())


def test_update_norms_equal_the_dense_ones() -> None:
    a = filled(fresh())
    for key, n in update_norms(a).items():
        assert n == pytest.approx(float(a.delta(key).dense().norm()), rel=1e-5)


def test_buckets_hold_every_row_once_and_little_padding() -> None:
    lengths = torch.randint(5, 60, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = bucketed(lengths, 8, torch.Generator().manual_seed(1))
    rows = [i for b in batches for i in b]
    assert sorted(rows) == list(range(1000)) and {len(b) for b in batches} == {8}
    padded = sum(max(lengths[i] for i in b) * len(b) for b in batches)
    assert padded / sum(lengths) < 1.05
    first, again = ([b for b, _ in zip(endless(lengths, 8, 3), range(300))] for _ in range(2))
    assert first == again
    few = bucketed([3, 4, 5], 8, torch.Generator().manual_seed(1))
    assert [sorted(b) for b in few] == [[0, 1, 2]], "fewer rows than a batch are one batch"


def test_schedules() -> None:
    linear = lc.TrainConfig(steps=10, lr=1.0, warmup=0.2)
    rates = [linear.rate(s) for s in range(1, 11)]
    assert (
        rates[:3] == [0.5, 1.0, 1.0]
        and rates[-1] == pytest.approx(1 / 8)
        and rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    )
    cosine = lc.TrainConfig(steps=10, lr=1.0, warmup=0.0, schedule="cosine")
    assert cosine.rate(1) == 1.0 and 0 < cosine.rate(10) < 0.03
    assert {lc.TrainConfig(steps=5, warmup=0.0, schedule="constant").rate(s) for s in range(1, 6)} == {1e-3}
    assert max(lc.TrainConfig(steps=7).eval_steps) == 7 and lc.TrainConfig(steps=60).eval_steps == {20, 40, 60}


@pytest.mark.parametrize(
    "wrong",
    [dict(steps=0), dict(steps=2.5), dict(steps=True), dict(lr=0), dict(lr=-1), dict(lr=float("nan")),
     dict(batch_size=0), dict(schedule="step"), dict(warmup=2), dict(seed=-1), dict(max_tokens=1),
     dict(clip=float("inf")), dict(dtype=[[1.0], float("nan")]), dict(device=None)],
)  # fmt: skip
def test_settings_that_are_not_possible(wrong: dict[str, Any]) -> None:
    with pytest.raises(lc.UserError):
        lc.TrainConfig(**wrong)


def test_config_to_dict_and_back() -> None:
    config = lc.TrainConfig(steps=7, lr=2e-3)
    assert lc.TrainConfig.from_dict(config.to_dict()) == config
    with pytest.raises(lc.UserError, match="did you mean 'steps'"):
        lc.TrainConfig.from_dict({"step": 7})


def test_training_a_merged_adapter_or_without_a_tokenizer_is_refused() -> None:
    a = filled(fresh())
    with pytest.raises(lc.UserError, match="tokenizer"):
        next(lc.train(a, TASK))
    a.merge()
    with pytest.raises(lc.UserError, match="unmerge"):
        run(a)
