"""Which matrices hold the gain: against every subset of a tiny model's matrices, measured one by one."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from tiny import tiny
from tokenizer_fixture import tiny_tokenizer

import lora_core as lc
from lora_core.dials import Dials
from lora_core.knockout import gain_shares, holders
from lora_core.registry import book_of

TOK = tiny_tokenizer()
ROWS = [lc.Row(f"the {a}", f"{b} is low") for a in ("fox", "dog", "pub") for b in ("price", "river")]


@pytest.fixture(scope="module")
def taught() -> tuple[Dials, lc.CausalLM, Any]:
    """An adapter on all kinds of matrices of two layers that has learnt the rows."""
    model = tiny("llama")
    a = lc.attach(model, lc.LoraSpec(targets=("q", "k", "v", "o", "gate", "up", "down"), rank=2, alpha=8.0), name="a")
    task = lc.load_data([{"prompt": r.prompt, "completion": r.completion} for r in ROWS])
    for _ in lc.train(a, task, lc.TrainConfig(steps=80, batch_size=6, lr=0.002, eval_rows=1), tokenizer=TOK):
        pass
    model.double()
    objective = lc.CausalLM(model, TOK, "{prompt} ->")
    return Dials(a), objective, objective.encode(ROWS)


def loss(dials: Dials, keys: tuple[str, ...]) -> float:
    """Of these matrices alone, by a path of its own: merged into W0 by hand, evaluated, taken out again."""
    model: Any = dials.adapter.model
    kept = []
    with torch.no_grad():
        for k in keys:
            W = model.get_submodule(dials.adapter.sites[k].path).weight
            kept.append((W, W.clone()))
            W += dials.adapter.delta(k).dense()
        found = lc.evaluate(model, TOK, ROWS, adapters=[None])[None].loss
        for W, old in kept:
            W.copy_(old)
    return found


def test_the_shares_sum_to_the_gain_and_are_derivatives(taught: Any) -> None:
    dials, objective, items = taught
    gain = loss(dials, ()) - loss(dials, tuple(dials.whole))
    assert gain > 0.2, "it has learnt something"
    found = gain_shares(dials, objective, items, points=12)
    assert sum(found.values()) == pytest.approx(gain, rel=1e-3)
    coarse = gain_shares(dials, objective, items)
    assert sum(coarse.values()) == pytest.approx(gain, rel=0.1) and list(coarse.values()) == sorted(
        coarse.values(), reverse=True)  # fmt: skip
    # one point of the rule is the derivative at half strength; here by central differences of one matrix's factor
    key = max(found, key=lambda k: found[k])
    one = gain_shares(dials, objective, items, points=1)[key]
    made, step, values = dials.attach(None, 0.5, name="half"), 1e-4, []
    B = made.factors(key).B
    for c in (0.5 + step, 0.5 - step):
        with torch.no_grad():
            B.copy_(dials.whole[key].B * c)
        values.append(lc.evaluate(dials.adapter.model, TOK, ROWS, adapters=["half"])["half"].loss)
    made.detach()
    assert one == pytest.approx((values[1] - values[0]) / (2 * step), rel=1e-3)
    assert list(book_of(dials.adapter.model).adapters) == ["a"]


def test_the_chosen_few_are_nearly_the_best_of_all_subsets(taught: Any) -> None:
    dials, objective, items = taught
    told: list[float] = []
    found = holders(dials, objective, items, 0.2, tell=told.append)
    assert len(found.keys) == 3 and found.share == 3 / 14 and told[-1] == 1.0 and told == sorted(told)
    base, whole = loss(dials, ()), loss(dials, tuple(dials.whole))
    assert found.base == pytest.approx(base, rel=1e-6) and found.whole == pytest.approx(whole, rel=1e-6)
    assert found.kept == pytest.approx(loss(dials, found.keys), rel=1e-6)
    assert found.held == pytest.approx((base - found.kept) / (base - whole))
    every = sorted(base - loss(dials, keys) for keys in itertools.combinations(dials.whole, 3))
    place = sum(g < base - found.kept for g in every) / len(every)
    print(f"kept {base - found.kept:.3f}, the best three {every[-1]:.3f}, better than {100 * place:.0f} % of all")
    assert place >= 0.95 and base - found.kept >= 0.8 * every[-1]


def test_no_gain_and_no_rows(taught: Any) -> None:
    dials, objective, items = taught
    a = dials.adapter
    with torch.no_grad():
        for key in a.sites:
            a.factors(key).B.neg_()  # what was learnt is unlearnt: worse than the base
    found = holders(Dials(a), objective, items)
    assert found.whole > found.base and math.isnan(found.held)
    with pytest.raises(lc.UserError, match="no held-out rows"):
        gain_shares(Dials(a), objective, [])
    with pytest.raises(lc.UserError, match=r"share is 0; it is above 0"):
        holders(Dials(a), objective, items, 0.0)
