"""What is recorded for a GPU: batches filled up compute the same, and what a recording depends on is seen. The
recordings themselves are tested in test_cuda.py, where there is a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import filled, tiny
from tokenizer_fixture import tiny_tokenizer

import lora_core as lc
from lora_core.graphs import EDGE, Gradients, _Step, padded, rounded, state_of
from lora_core.objective import Batch, CausalLM
from lora_core.train import update_norms


def goal_of(model: Any) -> CausalLM:
    return CausalLM(model, tiny_tokenizer(), "{prompt} ->")


def batch_of(rows: int, time: int, share: float, seed: int, parts: int = 1) -> Batch:
    """Random rows, of which this share of tokens is labelled, the same ones in all parts; at least one."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 300, (rows * parts, time), generator=g)
    labels = ids.view(parts, rows, time)[0].clone()
    labels[torch.rand(rows, time, generator=g) > share] = -100
    labels[0, 1] = 7
    labels = labels.repeat(parts, 1)
    return Batch(ids=ids, labels=labels, tokens=ids.numel(), labelled=int((labels[:, 1:] >= 0).sum()))


@given(n=st.integers(1, 5000))
def test_few_lengths_occur_and_none_is_much_longer(n: int) -> None:
    assert n <= rounded(n) <= max(n + EDGE - 1, 1.25 * n) and rounded(rounded(n)) == rounded(n)
    assert len({rounded(i) for i in range(1, n + 1)}) <= 8 + 4 * n.bit_length()


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 4), time=st.integers(2, 40), share=st.floats(0, 1), seed=st.integers(0, 99),
       parts=st.integers(1, 3))  # fmt: skip
def test_a_batch_that_is_filled_up_has_the_same_losses_and_gradients(rows: int, time: int, share: float, seed: int,
                                                                     parts: int) -> None:  # fmt: skip
    model = tiny("llama", dtype=torch.float64)
    names = [f"{i}" for i in range(parts)]
    adapters = [filled(lc.attach(model, lc.LoraSpec(rank=2, targets=("q", "o", "down")), name=n), seed=i)
                for i, n in enumerate(names)]  # fmt: skip
    params = [p for a in adapters for p in a.parameters()]
    goal, batch = goal_of(model), batch_of(rows, time, share, seed, parts)
    flat, shape = padded(batch, parts)
    assert shape[:2] == (rows * parts, rounded(time - 1)) and flat.numel() == shape[0] * shape[1] + 2 * shape[2] * parts
    at = flat[shape[0] * shape[1] :][: shape[2] * parts]
    assert len(at.unique()) == len(at)
    grads = [torch.zeros_like(p) for p in params]
    gradients = Gradients(goal, params)
    with lc.rows(model, names):
        losses = _Step(goal, shape, dict(zip(params, grads, strict=True)), None, warm=False)(flat, batch.labelled)
        want = gradients(batch, params, batch.labelled, parts)  # as it comes: no recordings on a CPU
    torch.testing.assert_close(losses, want, rtol=1e-9, atol=1e-9)
    for p, g in zip(params, grads, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(g, p.grad, rtol=1e-9, atol=1e-12)


def test_gradients_are_added_to_those_that_are_there() -> None:
    model = tiny("llama")
    params = list(filled(lc.attach(model, lc.LoraSpec(rank=2))).parameters())
    gradients, batch = Gradients(goal_of(model), params), batch_of(2, 9, 0.5, 0)
    gradients(batch, params, 4)
    once = [p.grad.clone() for p in params if p.grad is not None]
    gradients(batch, params, 4)
    for p, g in zip(params, once, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, 2 * g)


def test_what_a_recording_depends_on() -> None:
    model = tiny("llama")
    a = lc.attach(model, lc.LoraSpec(rank=2), name="a")
    first = state_of(model)
    assert first is not None and state_of(model) == first
    next(iter(a._factors.values())).scaling *= 2
    assert state_of(model) != first
    other = state_of(model)
    with lc.rows(model, ["a", None]):
        assert state_of(model) not in (None, other)
    with lc.rows(model, ["a", None, "a"]):  # not one piece
        assert state_of(model) is None
    b = lc.attach(model, lc.LoraSpec(rank=2), name="b")
    assert state_of(model) != other
    b.enable(False)
    assert state_of(model) == other
    model.train()
    assert state_of(model) != other


@pytest.mark.parametrize("module", ["model.layers.0.mlp.up_proj", "model.layers.1", "lm_head", "model.norm"])
def test_somebody_who_looks_on_ends_it(module: str) -> None:
    model = tiny("llama")
    lc.attach(model, lc.LoraSpec(rank=2))
    assert state_of(model) is not None
    handle = model.get_submodule(module).register_forward_hook(lambda *_: None)
    assert state_of(model) is None
    handle.remove()
    assert state_of(model) is not None


@pytest.mark.parametrize("spec", [{"full": ("model.norm",)}, {"targets": ("head",)}, {"bottleneck": 2}])
def test_methods_that_are_computed_as_they_come(spec: dict[str, Any]) -> None:
    model = tiny("llama")
    lc.attach(model, lc.LoraSpec(rank=2), name="a")
    assert state_of(model) is not None
    lc.attach(model, lc.LoraSpec(rank=2, **spec), name="b")
    assert state_of(model) is None


def test_models_and_weights_that_are_computed_as_they_come() -> None:
    model = tiny("gpt2")
    lc.attach(model, lc.LoraSpec(rank=2))
    assert state_of(model) is None
    assert state_of(tiny("llama")) is None  # all of whose weights are trained


@pytest.mark.parametrize("spec", [{}, {"dora": True}, {"init": "pissa"}])
def test_norms_are_those_of_the_update(spec: dict[str, Any]) -> None:
    model = tiny("llama")
    adapter = filled(lc.attach(model, lc.LoraSpec(targets=("q", "v", "down"), rank=3, **spec)))
    found = update_norms(adapter)
    assert list(found) == list(adapter.sites)
    for key, norm in found.items():
        assert norm == pytest.approx(float(adapter.delta(key).dense().norm()), rel=1e-4)
