"""Dials: a cut, a strength and a switch for every matrix, in place; many settings measured in one batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import filled, ids, tiny
from tokenizer_fixture import tiny_tokenizer

import lora_core as lc
from lora_core.dials import Dials, Interrupted, interruptible, losses_together
from lora_core.registry import book_of

TOK = tiny_tokenizer()
ROWS = [lc.Row("the fox", "jumps over the lazy dog"), lc.Row("prices", "are low"), lc.Row("a", "family-friendly pub"),
        lc.Row("reviews", "are excellent and prices are low")]  # fmt: skip


def logits(model: Any, name: str | None) -> torch.Tensor:
    lc.switch(model, None, name)
    with torch.no_grad():
        return model(ids()).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_every_dial_is_the_delta_that_it_says(family: str) -> None:
    """Against ΔW as dense matrices: cut by an SVD, multiplied, and merged by hand into W0; turned back and forth."""
    model = tiny(family, dtype=torch.float64)
    a = filled(lc.attach(model, lc.LoraSpec(targets=("q", "v"), rank=4, alpha=6.0), name="a"), std=0.3)
    dials = Dials(a)
    made = dials.attach(1, name="made")
    keys = list(a.sites)
    for ranks, strength in ((2, 1.0), ({keys[0]: 3, keys[2]: 1}, -0.5), (None, 2.0), (0, 1.0), (None, 1.0)):
        dials.turn(made, ranks, strength)
        for key, site in a.sites.items():
            U, S, Vh = torch.linalg.svd(a.delta(key).dense(), full_matrices=False)
            k = 4 if ranks is None else ranks if isinstance(ranks, int) else ranks.get(key, 0)
            want = strength * (U[:, :k] * S[:k]) @ Vh[:k]
            torch.testing.assert_close(made.delta(key).dense(), want, rtol=0, atol=1e-12)
            assert made.sites[key] is site
        assert dials.is_base(ranks, strength) == (ranks == 0)
    assert dials.is_base(3, 0.0) and not made.on
    torch.testing.assert_close(logits(model, "made"), logits(model, "a"), rtol=0, atol=1e-10)
    with pytest.raises(lc.UserError, match="negative"):
        dials.turn(made, {keys[0]: -1})
    norms = lc.attach(tiny("llama"), lc.LoraSpec(targets=("norm",)))
    with pytest.raises(lc.UserError, match="no low-rank updates"):
        Dials(norms)


def test_what_is_trained_beside_it_goes_on_acting() -> None:
    model = tiny("llama", dtype=torch.float64)
    a = filled(lc.attach(model, lc.LoraSpec(targets=("q", "norm"), rank=2, dora=True), name="a"), std=0.3)
    made = Dials(a).attach()
    torch.testing.assert_close(logits(model, made.name), logits(model, "a"), rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_many_settings_in_one_batch_are_those_measured_alone(family: str) -> None:
    model = tiny(family, dtype=torch.float64)
    a = filled(lc.attach(model, lc.LoraSpec(targets=("q", "v"), rank=3), name="a"), std=0.5)
    dials = Dials(a)
    for k in (0, 1, 2):
        dials.attach(k, name=f"k{k}")
    names = [None, "k0", "k1", "k2", "a"]
    objective = lc.CausalLM(model, TOK, "{prompt} ->")
    items = objective.encode(ROWS)
    alone = {n: found.loss for n, found in lc.evaluate(model, TOK, ROWS, adapters=names).items()}
    for tokens in (1, 200, 5000):  # one row at a time, some, all
        sums, labelled, rows = [0.0] * len(names), 0, 0
        for take, values, count in losses_together(objective, items, names, tokens=tokens):
            sums = [s + v for s, v in zip(sums, values, strict=True)]
            labelled, rows = labelled + count, rows + take
        assert rows == len(ROWS) and labelled == sum(len(e) - e.start for e in items)
        for n, s in zip(names, sums, strict=True):
            assert s / labelled == pytest.approx(alone[n], rel=1e-9)
    rest = sum(take for take, _, _ in losses_together(objective, items, names, begin=3))
    assert rest == 1 and alone["k0"] == pytest.approx(alone[None], rel=1e-9)


def test_a_pass_can_be_interrupted_and_leaves_nothing_behind() -> None:
    model = tiny("llama")
    a = filled(lc.attach(model, lc.LoraSpec(rank=2), name="a"))
    calls = []

    def stop() -> bool:
        calls.append(1)
        return len(calls) > 1

    with pytest.raises(Interrupted), interruptible(model, [None, "a"], stop):
        model(ids())
    assert len(calls) == 2, "it ended at the second adapted matrix"
    model(ids())
    assert len(calls) == 2 and list(book_of(model).adapters) == ["a"] and a.on
