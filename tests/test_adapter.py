"""Attach, detach, merge, switch and mix, on tiny models of every family; then in any order (a state machine)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tiny import FAMILIES, bits, filled, ids, targets_of, tiny

import lora_core as lc
from lora_core.registry import book_of

each_family = pytest.mark.parametrize("family", FAMILIES)


def logits(model: Any, x: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(ids() if x is None else x).logits


def all_of(model: Any, **more: Any) -> lc.LoraSpec:
    return lc.LoraSpec(targets=targets_of(model), rank=4, alpha=8, **more)


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attach_is_bit_identical_and_detach_leaves_no_trace(family: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype=dtype)
    before, weights, kinds = logits(model), bits(model), [type(m) for m in model.modules()]
    adapter = lc.attach(model, all_of(model))
    assert torch.equal(logits(model), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if n.endswith((".A", ".B"))
    }
    filled(adapter)
    assert not torch.equal(logits(model), before)
    assert bits(model).keys() == weights.keys(), "the model's own file stays the base model's"
    adapter.detach()
    assert torch.equal(logits(model), before)
    assert [type(m) for m in model.modules()] == kinds and "lora_adapters" not in model.__dict__
    assert all(p.requires_grad for p in model.parameters())


@each_family
def test_merged_equals_unmerged_and_unmerge_restores_the_bits(family: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = tiny(family, dtype=dtype)
        weights = bits(model)
        adapter = filled(lc.attach(model, all_of(model)))
        unmerged = logits(model)
        adapter.merge()
        torch.testing.assert_close(logits(model), unmerged, rtol=0, atol=tolerance)
        key = next(iter(adapter.sites))
        W = adapter.sites[key].weight(model.get_submodule(adapter.sites[key].path))
        torch.testing.assert_close(W, adapter.W0(key) + adapter.delta(key).dense(), rtol=0, atol=tolerance)
        adapter.unmerge()
        assert all(torch.equal(v, weights[n]) for n, v in bits(model).items())


def test_merge_computes_in_float32_and_rounds_once() -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    adapter = filled(lc.attach(model, lc.LoraSpec(targets=("q",), rank=4, alpha=8)))
    key = next(iter(adapter.sites))
    f, W0 = adapter.factors(key), adapter.W0(key)
    adapter.merge()
    want = (W0.float() + f.scaling * (f.B @ f.A)).to(torch.bfloat16)
    assert torch.equal(model.get_submodule(key).weight, want)


@each_family
def test_every_slice_is_its_own_matrix(family: str) -> None:
    """Adapting one matrix changes the weight's rows of that matrix and no others: against rows found from scratch."""
    model = tiny(family)
    config, hd = model.config, 8
    for target in targets_of(model):
        adapter = filled(lc.attach(model, lc.LoraSpec(targets=(target,), rank=2, alpha=2)))
        site = next(iter(adapter.sites.values()))
        W = model.get_submodule(site.path).weight.detach().clone()
        adapter.merge()
        changed = (model.get_submodule(site.path).weight.detach() - W).abs()
        changed = (changed.T if site.transposed else changed).amax(1) > 0
        want = torch.ones_like(changed)
        if family == "gpt2" and target in "qkv":
            want = torch.zeros_like(changed)
            want["qkv".index(target) * 32 : ("qkv".index(target) + 1) * 32] = True
        if family == "gpt_neox" and target in "qkv":
            want = torch.zeros_like(changed)
            for head in range(config.num_attention_heads):
                start = (3 * head + "qkv".index(target)) * hd
                want[start : start + hd] = True
        assert torch.equal(changed, want), target
        adapter.detach()


@each_family
def test_exactly_the_factors_get_gradients(family: str) -> None:
    model = tiny(family)
    adapter = filled(lc.attach(model, all_of(model)))
    model(ids()).logits.square().mean().backward()
    with_grad = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert len(with_grad) == len(list(adapter.parameters()))
    assert all(".lora." in n for n in with_grad)


@each_family
def test_rows_of_a_batch_equal_separate_passes(family: str) -> None:
    model = tiny(family, dtype=torch.float64)
    filled(lc.attach(model, all_of(model), name="a"), 1)
    filled(lc.attach(model, lc.LoraSpec(targets=("q", "v"), rank=2), name="b"), 2)
    x = ids(5)
    alone = {}
    for name in ("a", "b", None):
        lc.switch(model, None, name)
        alone[name] = logits(model, x)
    for names in (["a", None, "b", "a", None], ["a"] * 5, [None] * 5, ["b", "b", "a", "a", "a"]):
        with lc.rows(model, names):
            mixed = logits(model, x)
        for i, name in enumerate(names):
            torch.testing.assert_close(mixed[i], alone[name][i], rtol=0, atol=1e-12)
    assert torch.equal(logits(model, x), alone[None]), "what acted before acts again"


def test_gradients_flow_through_rows() -> None:
    model = tiny("llama", dtype=torch.float64)
    a = filled(lc.attach(model, lc.LoraSpec(rank=2), name="a"))
    x = ids(2)
    with lc.rows(model, ["a", None]):
        model(x).logits[0].sum().backward()
    mixed = [p.grad.clone() for p in a.parameters() if p.grad is not None]
    model.zero_grad()
    model(x[:1]).logits.sum().backward()
    for g, p in zip(mixed, a.parameters()):
        torch.testing.assert_close(g, p.grad, rtol=1e-9, atol=1e-12)


def test_switch_leaves_only_the_new_one_acting() -> None:
    model = tiny("llama")
    base = logits(model)
    a = filled(lc.attach(model, lc.LoraSpec(targets=("q", "v"), rank=4), name="a"), 1)
    ya = logits(model)
    b = filled(lc.attach(model, lc.LoraSpec(targets=("gate",), rank=2), name="b"), 2)
    assert not torch.equal(logits(model), ya), "adapters that are on add up"
    lc.switch(model, "b", "a")
    assert torch.equal(logits(model), ya)
    a.merge()
    lc.switch(model, "a", "b")
    assert b.merged and not a.merged and not a.on
    lc.switch(model, "b", None)
    assert torch.equal(logits(model), base)


def test_disabled_is_the_base_model_merged_or_not() -> None:
    model = tiny("gpt2")
    base = logits(model)
    a = filled(lc.attach(model, lc.LoraSpec(targets=("q", "v"))))
    on = logits(model)
    with a.disabled():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), on)
    a.merge()
    with a.disabled():
        assert torch.equal(logits(model), base)
    assert a.merged


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    model = tiny("llama")
    a = filled(lc.attach(model, lc.LoraSpec()))
    twin = copy.deepcopy(model)
    want = logits(model)
    a.detach()
    assert torch.equal(logits(twin), want)
    book_of(twin).adapters["default"].detach()
    assert torch.equal(logits(twin), logits(model))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (dict(targets=("qproj",)), r"no matrix 'qproj' in LlamaForCausalLM; this model has q k v o gate up down \(did"),
        (dict(targets=("q", "bias")), "'bias' hits nothing"),
        (dict(targets=("model.layers.0.mlp.gate_prj",)), "did you mean 'model.layers.0.mlp.gate_proj'"),
        (dict(layers=(2,)), "no layer 2 in LlamaForCausalLM; its layers are 0 to 1"),
        (dict(rank=33), r"rank 33 is above the smaller side of .*q_proj \(32×32\)"),
        (dict(targets=("v",), rank=17), r"v_proj \(16×32\); the largest rank possible there is 16"),
        (dict(rank_pattern={"k": 2}), "rank_pattern"),
    ],
)
def test_specs_that_do_not_fit_the_model(spec: dict[str, Any], says: str) -> None:
    model = tiny("llama")
    with pytest.raises(lc.UserError, match=says):
        lc.attach(model, lc.LoraSpec(**spec))
    assert all(p.requires_grad for p in model.parameters()), "nothing was touched"


@pytest.mark.parametrize(
    "wrong",
    [dict(rank=0), dict(rank=True), dict(rank=2.5), dict(alpha=float("nan")), dict(alpha=0), dict(targets=()),
     dict(targets=""), dict(layers=()), dict(layers="some"), dict(layers=(-1,)), dict(scaling="alpha"),
     dict(init="zero"), dict(dropout=1.0)],
)  # fmt: skip
def test_specs_that_are_never_possible(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        lc.LoraSpec(**wrong)


def test_spec_to_dict_and_back() -> None:
    spec = lc.LoraSpec(targets=("v", "q"), layers=(3, 1), scaling="alpha/sqrt(r)", rank_pattern={"v": 2}, dropout=0.1)
    assert lc.LoraSpec.from_dict(spec.to_dict()) == spec
    assert spec.scale(4, 8) == 4.0 and lc.LoraSpec(rank=4, alpha=8).scale() == 2.0
    with pytest.raises(lc.UserError, match="did you mean 'rank'"):
        lc.LoraSpec.from_dict({"rnk": 3})


def test_names() -> None:
    model = tiny("llama")
    lc.attach(model, lc.LoraSpec(), name="e2e")
    with pytest.raises(lc.UserError, match="already"):
        lc.attach(model, lc.LoraSpec(), name="e2e")
    with pytest.raises(lc.UserError, match="cannot name"):
        lc.attach(model, lc.LoraSpec(), name="../x")
    with pytest.raises(lc.UserError, match="did you mean 'e2e'"):
        lc.switch(model, None, "e2")


def test_per_target_and_per_layer_rank_and_alpha() -> None:
    model = tiny("llama")
    key = "model.layers.1.self_attn.v_proj"
    spec = lc.LoraSpec(targets=("q", "v"), rank=4, alpha=8, rank_pattern={"v": 2, key: 3}, alpha_pattern={"v": 6})
    a = lc.attach(model, spec)
    got = {k: (f.A.shape[0], f.scaling) for k in a.sites for f in [a.factors(k)]}
    assert got[key] == (3, 2.0) and got["model.layers.0.self_attn.v_proj"] == (2, 3.0)
    assert got["model.layers.0.self_attn.q_proj"] == (4, 2.0)


class AnyOrder(RuleBasedStateMachine):
    """Whatever is done in whatever order, the model computes base + what acts, and W0 comes back to the bit."""

    @initialize(family=st.sampled_from(FAMILIES))
    def start(self, family: str) -> None:
        self.model = tiny(family, dtype=torch.float64)
        self.weights, self.base = bits(self.model), logits(self.model)
        self.deltas: dict[str, dict[str, lc.Delta]] = {}
        self.count = 0

    def adapters(self) -> dict[str, Any]:
        return book_of(self.model).adapters if "lora_adapters" in self.model.__dict__ else {}

    @precondition(lambda self: len(self.adapters()) < 3)
    @rule(
        matrix=st.sampled_from(["q", "v", "o", "down", "embed", "head", "norm"]),
        rank=st.integers(1, 4),
        trained=st.booleans(),
        more=st.sampled_from([{}, {"dora": True}, {"mask": 0.1}, {"init": "pissa"}]),
    )
    def attach(self, matrix: str, rank: int, trained: bool, more: dict[str, Any]) -> None:
        self.count += 1
        spec = lc.LoraSpec(targets=(matrix, "q"), rank=rank, alpha=3, **more)
        try:
            a = lc.attach(self.model, spec, name=f"a{self.count}")
        except lc.UserError:  # DoRA beside something merged, or on an embedding
            assert spec.dora
            return
        if trained:
            filled(a, self.count)

    @precondition(lambda self: self.adapters())
    @rule(data=st.data(), what=st.sampled_from(["merge", "unmerge", "detach", "toggle", "switch", "train", "copy"]))
    def act(self, data: st.DataObject, what: str) -> None:
        a = self.adapters()[data.draw(st.sampled_from(sorted(self.adapters())))]
        if what == "switch":
            old = data.draw(st.sampled_from([None, *sorted(self.adapters())]))
            before = {n: (b.on, b.merged) for n, b in self.adapters().items()}
            try:
                lc.switch(self.model, old, a.name)
            except lc.UserError:  # DoRA on the same matrices as what is to be merged: nothing has changed
                assert any(b.spec.dora for b in self.adapters().values())
                assert {n: (b.on, b.merged) for n, b in self.adapters().items()} == before
        elif what == "toggle":
            if not a.merged:
                a.enable(not a.on)
        elif what == "train":
            if not a.merged:
                filled(a, data.draw(st.integers(0, 9)))
        elif what == "copy":
            self.model = copy.deepcopy(self.model)
        else:
            try:
                getattr(a, what)()
            except lc.UserError:
                assert what == "merge" and any(b.spec.dora for b in self.adapters().values())

    @invariant()
    def computes_the_sum(self) -> None:
        if not hasattr(self, "model"):
            return
        acting = [a for a in self.adapters().values() if a.on or a.merged]
        reference = tiny_like(self.model, self.weights)
        for a in acting:
            for key, d in a.deltas().items():
                site = a.sites[key]
                W = reference.get_submodule(site.path).weight.data
                view = W.T if site.transposed else W
                view[slice(None) if site.rows is None else site.rows] += d.dense()
            for name, value in a.copies.items():
                with torch.no_grad():
                    reference.get_parameter(name).add_(value - self.weights[name])
        torch.testing.assert_close(logits(self.model), logits(reference), rtol=0, atol=1e-10)
        if not any(a.merged for a in acting):
            assert all(torch.equal(v, self.weights[n]) for n, v in bits(self.model).items())


def tiny_like(model: Any, weights: dict[str, torch.Tensor]) -> Any:
    """A fresh model of the same family with those weights."""
    fresh = tiny(model.config.model_type, dtype=torch.float64)
    fresh.load_state_dict(weights)
    return fresh


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
