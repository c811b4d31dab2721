"""The fast path computes what the plain one does, with its gradients; and gives way where it does not apply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import filled, tiny
from tokenizer_fixture import tiny_tokenizer
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from zoo import CONFIGS, make

import lora_core as lc
from lora_core import fast
from lora_core.objective import CausalLM
from lora_core.tasks import Row


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def agree(quick: Callable[..., Any], plain: Callable[..., Tensor], *args: Any) -> None:
    """Values and gradients of all float inputs that are to have one."""
    results = []
    for f in (quick, plain):
        given_ = [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor)
                  and a.is_floating_point() else a for a in args]  # fmt: skip
        y = f(*given_)
        (y * draw(*y.shape, seed=9)).sum().backward()
        results.append((y, [a.grad for a in given_ if isinstance(a, Tensor) and a.requires_grad]))
    (y, grads), (want, wanted) = results
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-12)
    for g, w in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), size=st.integers(1, 9), seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3))
def test_norm(rows: int, size: int, seed: int, scale: float) -> None:
    x, w = (draw(rows, size, seed=seed) * scale).requires_grad_(), draw(size, seed=seed + 1)
    agree(fast.Norm.apply, fast.plain_norm, x, w, 1e-5)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_swiglu(rows: int, size: int, seed: int) -> None:
    agree(fast.SwiGLU.apply, fast.plain_swiglu, draw(rows, size, seed=seed).requires_grad_(),
          draw(rows, size, seed=seed + 1).requires_grad_())  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 3), time=st.integers(1, 5), heads=st.integers(1, 3), half=st.integers(1, 4))
def test_rotate(rows: int, time: int, heads: int, half: int) -> None:
    angle = draw(time, half, seed=1)
    x = draw(rows, time, heads, 2 * half).requires_grad_()
    agree(fast.Rotate.apply, fast.plain_rotate, x, angle.cos(), angle.sin())


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 9), words=st.integers(2, 20), seed=st.integers(0, 99), at_a_time=st.integers(1, 9))
def test_loss(n: int, words: int, seed: int, at_a_time: int) -> None:
    targets = torch.randint(0, words, (n,), generator=torch.Generator().manual_seed(seed))
    before, fast.LOGITS = fast.LOGITS, at_a_time * 4 * words
    try:
        agree(fast.Loss.apply, fast.plain_loss, draw(n, 4, seed=seed).requires_grad_(), draw(words, 4), targets)
    finally:
        fast.LOGITS = before


# ---- the body --------------------------------------------------------------------------------------------------------
LIKE = [n for n in CONFIGS if n.startswith(("llama", "mistral", "qwen2")) and n != "qwen2_moe"]
ROWS = [Row("name: Blue", "a quiet place"), Row("food", "x"), Row("name: Green, food: fish", "served at the riverside")]


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' RMSNorms round to float32 on the way; without that float64 tells right from nearly right."""
    for kind in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm):
        monkeypatch.setattr(kind, "forward", lambda self, x: fast.plain_norm(x, self.weight, self.variance_epsilon))


@pytest.mark.parametrize("name", CONFIGS)
def test_who_has_a_fast_body(name: str) -> None:
    model = make(name)
    if name == "mistral, wide heads":
        model.config.sliding_window = None
    assert (fast.body(model) is not None) == (name in LIKE)


@pytest.mark.parametrize("name", LIKE)
@pytest.mark.parametrize("spec", [
    {}, {"targets": ("q", "k", "v", "o", "gate", "up", "down")}, {"targets": ("v", "embed", "norm")},
    {"targets": ("down",), "layers": (1,)}, {"dora": True}, {"targets": ("head", "q")}])  # fmt: skip
@pytest.mark.usefixtures("exact_norms")
def test_loss_and_gradients_are_transformers_own(name: str, spec: dict[str, Any]) -> None:
    model = make(name)
    model.config.sliding_window = None
    adapter = lc.attach(model, lc.LoraSpec(**{"rank": 2, **spec}))
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.add_(0.1 * draw(*p.shape, seed=i))
    objective = CausalLM(model, tiny_tokenizer(), "{prompt} ->")
    batch = objective.batch(objective.encode(ROWS))
    batch.ids.remainder_(model.config.vocab_size)
    batch.labels.copy_(torch.where(batch.labels < 0, batch.labels, batch.labels % model.config.vocab_size))
    results = []
    assert objective.fast is not None
    for quick in (objective.fast, None):
        objective.fast = quick
        loss = objective.loss(batch)
        loss.backward()
        results.append((loss.detach(), [cast(Tensor, p.grad) for p in adapter.parameters()]))
        for p in adapter.parameters():
            p.grad = None
    torch.testing.assert_close(*(loss for loss, _ in results), rtol=1e-9, atol=0)
    for mine, theirs in zip(*(grads for _, grads in results), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-12)


@pytest.mark.usefixtures("exact_norms")
def test_rows_with_their_own_adapters_in_the_fast_body() -> None:
    model = tiny("llama", dtype=torch.float64)
    filled(lc.attach(model, lc.LoraSpec(rank=2), name="a"))
    run = fast.body(model)
    assert run is not None
    ids = torch.randint(0, 300, (3, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), lc.rows(model, ["a", None, "a"]):
        torch.testing.assert_close(run(ids), model.base_model(ids)[0], rtol=1e-9, atol=1e-10)


def test_it_gives_way_to_hooks_and_checkpointing() -> None:
    model = tiny("llama", dtype=torch.float64)
    run = fast.body(model)
    assert run is not None
    seen = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    run(torch.tensor([[1, 2, 3]]))
    assert seen == [1]
    handle.remove()
    run(torch.tensor([[1, 2, 3]]))
    assert seen == [1]
    model.gradient_checkpointing_enable()
    model.train()
    calls = []
    handle = model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    run(torch.tensor([[1, 2, 3]]))
    handle.remove()
    assert calls == [1]


def test_another_models_dropout_or_window_is_left_to_transformers() -> None:
    for name, value in (("attention_dropout", 0.1), ("sliding_window", 4), ("hidden_act", "gelu")):
        model = make("mistral, wide heads")
        model.config.sliding_window = None
        assert fast.body(model) is not None
        setattr(model.config, name, value)
        assert fast.body(model) is None, name
    assert fast.body(make("llama", torch.bfloat16)) is None
