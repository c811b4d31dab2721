"""Adapters out of adapters: the laws of each combination; and what switching by subtraction costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import FAMILIES, bits, filled, ids, tiny

import lora_core as lc


def out(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()).logits


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    m = tiny(request.param, dtype=torch.float64)
    filled(lc.attach(m, lc.LoraSpec(targets=("q", "v"), rank=3, alpha=6), name="a"), 1)
    filled(lc.attach(m, lc.LoraSpec(targets=("q", "o"), rank=2, alpha=2), name="b"), 2)
    return m


def wanted(model: Any, weights: dict[str, float]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for n, w in weights.items():
        for key, d in lc.get_adapter(model, n).deltas().items():
            total[key] = total.get(key, 0) + w * d.dense()
    return total


def test_sum_is_the_weighted_sum_of_the_updates(model: Any) -> None:
    weights = {"a": 0.5, "b": -2.0}
    before = out(model)
    c = lc.combine(model, weights, "c")
    assert torch.equal(out(model), before) and not c.on
    for key, want in wanted(model, weights).items():
        torch.testing.assert_close(c.delta(key).dense(), want, rtol=1e-10, atol=1e-12)
    lc.switch(model, None, "c")
    mixed = out(model)
    c.merge()
    torch.testing.assert_close(out(model), mixed, rtol=0, atol=1e-10)


def test_svd_is_off_by_exactly_what_it_cuts(model: Any) -> None:
    weights = {"a": 1.0, "b": 1.0}
    c = lc.combine(model, weights, "c", method="svd", rank=2)
    for key, want in wanted(model, weights).items():
        tail = torch.linalg.svdvals(want)[2:].norm()
        assert c.delta(key).rank == 2
        assert float((c.delta(key).dense() - want).norm()) == pytest.approx(float(tail), rel=1e-9, abs=1e-12)


def test_factors_is_the_sum_only_without_cross_terms() -> None:
    m = tiny("llama", dtype=torch.float64)
    spec = lc.LoraSpec(targets=("q",), rank=2, alpha=6)
    a, b = (filled(lc.attach(m, spec, name=n), i) for i, n in enumerate("ab"))
    c = lc.combine(m, {"a": 1.0}, "alone", method="factors")
    for key in a.sites:
        torch.testing.assert_close(c.delta(key).dense(), a.delta(key).dense(), rtol=1e-10, atol=1e-12)
    d = lc.combine(m, {"a": 0.3, "b": 0.7}, "both", method="factors")
    for key in a.sites:
        x, y = a.delta(key), b.delta(key)
        cross = (0.3 * 0.7) ** 0.5 * x.scaling * (x.B @ y.A + y.B @ x.A)
        want = 0.3 * x.dense() + 0.7 * y.dense() + cross
        torch.testing.assert_close(d.delta(key).dense(), want, rtol=1e-10, atol=1e-12)


def test_combined_adapters_are_saved_and_loaded_exactly(tmp_path: Any) -> None:
    m = tiny("gpt2")
    filled(lc.attach(m, lc.LoraSpec(targets=("q", "v"), rank=3), name="a"), 1)
    filled(lc.attach(m, lc.LoraSpec(targets=("q",), rank=2), name="b"), 2)
    c = lc.combine(m, {"a": 1.0, "b": 1.0}, "c")
    c.save(tmp_path)
    again = lc.load_adapter(m, tmp_path, name="again")
    for key, d in c.deltas().items():
        assert torch.equal(again.delta(key).dense(), d.dense())


def test_what_does_not_go_together_is_refused(model: Any) -> None:
    for more, says in (
        (dict(weights={}), "nothing to combine"), (dict(weights={"x": 1.0}), "no adapter 'x'"),
        (dict(method="mean"), "no method 'mean'"), (dict(method="factors"), "equal ranks"),
    ):  # fmt: skip
        with pytest.raises(lc.UserError, match=says):
            lc.combine(model, **{"weights": {"a": 1.0, "b": 1.0}, "name": "c", **more})


@pytest.mark.parametrize(("dtype", "worst"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_subtract_add_drifts_and_switch_does_not(dtype: torch.dtype, worst: float) -> None:
    m = tiny("llama", dtype=dtype)
    a = filled(lc.attach(m, lc.LoraSpec(targets=("q",), rank=4), name="a"), 1)
    filled(lc.attach(m, lc.LoraSpec(targets=("q",), rank=4), name="b"), 2)
    weights, key = bits(m), next(iter(a.sites))
    lc.subtract_add(m, None, "a")
    for i in range(20):
        lc.subtract_add(m, *(("a", "b") if i % 2 == 0 else ("b", "a")))
    lc.subtract_add(m, "a", None)
    changed, size = lc.drift(m.get_submodule(key).weight, weights[f"{key}.weight"])
    assert 0.01 < changed <= 1 and 0 < size < worst, "the weights are near W0 and no longer W0"
    m.load_state_dict(weights)
    a.merge()
    for i in range(20):
        lc.switch(m, *(("a", "b") if i % 2 == 0 else ("b", "a")))
    lc.switch(m, "a", None)
    assert lc.drift(m.get_submodule(key).weight, weights[f"{key}.weight"]) == (0.0, 0.0)


def test_what_was_trained_itself_is_combined_too() -> None:
    model = tiny("llama", dtype=torch.float64)
    spec = lc.LoraSpec(targets=("q", "embed", "norm"), rank=2)
    for i, name in enumerate("ab"):
        a = filled(lc.attach(model, spec, name=name), i)
        a.enable(False)
    both = lc.combine(model, {"a": 0.5, "b": 2.0}, "both", method="svd", rank=4)
    assert both.sites["model.embed_tokens"].also == ("lm_head",)
    for key, copy in both.copies.items():
        W, a, b = model.get_parameter(key), *(lc.get_adapter(model, n).copies[key] for n in "ab")
        torch.testing.assert_close(copy, W + 0.5 * (a - W) + 2.0 * (b - W))
    lc.switch(model, None, "both")
    with torch.no_grad():
        want = model(ids()).logits
        both.merge()
        torch.testing.assert_close(model(ids()).logits, want, rtol=0, atol=1e-10)


def test_dora_is_combined_by_its_true_update() -> None:
    model = tiny("llama", dtype=torch.float64)
    a = filled(lc.attach(model, lc.LoraSpec(targets=("q",), rank=2, dora=True), name="a"), 1)
    want = {k: 0.5 * d for k, d in a.deltas().items()}
    half = lc.combine(model, {"a": 0.5}, "half")
    for key, d in half.deltas().items():
        torch.testing.assert_close(d.dense(), want[key].dense())
