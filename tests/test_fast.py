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
from lora_core import fast, kernels
from lora_core.adapted import few_rows
from lora_core.layers import few
from lora_core.objective import Batch, CausalLM
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
    agree(kernels.Norm.apply, kernels.plain_norm, x, w, 1e-5)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_swiglu(rows: int, size: int, seed: int) -> None:
    agree(kernels.SwiGLU.apply, kernels.plain_swiglu, draw(rows, size, seed=seed).requires_grad_(),
          draw(rows, size, seed=seed + 1).requires_grad_())  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 5), heads=st.integers(1, 3), half=st.integers(1, 4))
def test_rotate(tokens: int, heads: int, half: int) -> None:
    angle = draw(tokens, half, seed=1)
    x = draw(tokens, heads, 2 * half).requires_grad_()
    agree(kernels.Rotate.apply, kernels.plain_rotate, x, angle.cos(), angle.sin())


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 3), kinds=st.integers(1, 2), share=st.integers(1, 3), time=st.integers(1, 5),
       at_a_time=st.integers(1, 3))  # fmt: skip
def test_attention(rows: int, kinds: int, share: int, time: int, at_a_time: int) -> None:
    q, k, v = (draw(rows, n, time, 4, seed=i).requires_grad_() for i, n in enumerate((kinds * share, kinds, kinds)))
    before, kernels.LOGITS = kernels.LOGITS, at_a_time * 8 * kinds * share * time**2
    try:
        agree(kernels.Attend.apply, kernels.plain_attention, q, k, v, 0.3)
    finally:
        kernels.LOGITS = before


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 6), places=st.lists(st.integers(0, 5), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_spread_and_pick(n: int, places: list[int], seed: int) -> None:
    of = torch.tensor([p % n for p in places])
    agree(kernels.Spread.apply, lambda x, i: x[i], draw(n, 3, seed=seed).requires_grad_(), of)
    agree(kernels.Pick.apply, lambda x, i: x[i], draw(n, 3, seed=seed).requires_grad_(), of.unique())


@settings(max_examples=100, deadline=None)
@given(data=st.data(), rows=st.integers(1, 5), time=st.integers(1, 6))
def test_a_tree_has_every_beginning_once(data: st.DataObject, rows: int, time: int) -> None:
    ids = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, 2), min_size=time, max_size=time), min_size=rows,
                                          max_size=rows)))  # fmt: skip
    at = torch.tensor(sorted(data.draw(st.sets(st.integers(0, rows * time - 1), min_size=1))))
    tree = fast.tree_of(ids, at)
    assert tree is not None
    last = {r: max(int(p) % time for p in at if int(p) // time == r) for r in {int(p) // time for p in at}}
    begins = {(r, t): tuple(ids[r, : t + 1].tolist()) for r, end in last.items() for t in range(end + 1)}
    assert len(tree.first) == len(set(begins.values()))
    for (r, t), begin in begins.items():
        r0, t0 = divmod(int(tree.first[tree.of[r * time + t]]), time)
        assert (r0, t0) <= (r, t) and begins[r0, t0] == begin


def test_a_tree_of_parts_shares_nothing_between_them_and_is_none_where_they_differ() -> None:
    ids, at = torch.tensor([[1, 2], [1, 3], [1, 2], [1, 3]]), torch.tensor([1, 3, 5, 7])
    tree = fast.tree_of(ids, at, parts=2)
    assert tree is not None and tree.first.tolist() == [0, 1, 3, 4, 5, 7]
    assert fast.tree_of(ids, torch.tensor([1, 3, 5]), parts=2) is None
    assert fast.tree_of(torch.tensor([[1, 2], [1, 3], [1, 2], [1, 2]]), at, parts=2) is None


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 9), words=st.integers(2, 20), seed=st.integers(0, 99), at_a_time=st.integers(1, 9))
def test_loss(n: int, words: int, seed: int, at_a_time: int) -> None:
    targets = torch.randint(0, words, (n,), generator=torch.Generator().manual_seed(seed))
    before, kernels.LOGITS = kernels.LOGITS, at_a_time * 4 * words
    try:
        agree(kernels.Loss.apply, kernels.plain_loss, draw(n, 4, seed=seed).requires_grad_(), draw(words, 4), targets)
    finally:
        kernels.LOGITS = before


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 9), words=st.integers(2, 20), seed=st.integers(0, 99), scale=st.floats(0.01, 300))
def test_a_gpus_way_to_the_chances_is_the_same(n: int, words: int, seed: int, scale: float) -> None:
    """Also of tokens whose p is 0 in float64, as at a scale of 300; for fewer tokens than rows."""
    logits = draw(n + 2, words, seed=seed) * scale
    t = torch.randint(0, words, (n, 1), generator=torch.Generator().manual_seed(seed))
    for mine, want in zip(kernels.chances_gpu(logits, t), kernels.chances(logits.clone(), t), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-12)


# ---- the body --------------------------------------------------------------------------------------------------------
LIKE = [n for n in CONFIGS if n.startswith(("llama", "mistral", "qwen2")) and n != "qwen2_moe"]
ROWS = [Row("name: Blue", "a quiet place"), Row("food", "x"), Row("name: Green, food: fish", "served at the riverside"),
        Row("name: Blue", "a pub"), Row("name: Blue", "a quiet pub")]  # fmt: skip


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' RMSNorms round to float32 on the way; without that float64 tells right from nearly right."""
    for kind in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm):
        monkeypatch.setattr(kind, "forward", lambda self, x: kernels.plain_norm(x, self.weight, self.variance_epsilon))


def rows_of(model: Any) -> tuple[CausalLM, Batch]:
    objective = CausalLM(model, tiny_tokenizer(), "{prompt} ->")
    batch = objective.batch(objective.encode(ROWS))
    batch.ids.remainder_(model.config.vocab_size)
    batch.labels.copy_(torch.where(batch.labels < 0, batch.labels, batch.labels % model.config.vocab_size))
    return objective, batch


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
    objective, batch = rows_of(model)
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
    for at in (torch.arange(18), torch.tensor([1, 4, 7, 10, 13, 16]), torch.tensor([17])):
        for names in (["a", None, "a"], ["a"]):
            with torch.no_grad(), lc.rows(model, names):
                want = model.base_model(ids)[0].flatten(0, 1)[at]
                torch.testing.assert_close(run(ids, at), want, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("exact_norms")
def test_dropout_is_drawn_for_every_place() -> None:
    model = tiny("llama", dtype=torch.float64)
    filled(lc.attach(model, lc.LoraSpec(rank=2, dropout=0.5)))
    run = fast.body(model)
    assert run is not None
    model.train()
    h = run(torch.tensor([[1, 2, 3], [1, 2, 3]]), torch.arange(6))
    assert (h[:3] - h[3:]).abs().max() > 1e-6


def test_it_gives_way_to_hooks_and_checkpointing() -> None:
    model = tiny("llama", dtype=torch.float64)
    run = fast.body(model)
    assert run is not None
    seen = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    run(torch.tensor([[1, 2, 3]]), torch.arange(3))
    assert seen == [1]
    handle.remove()
    run(torch.tensor([[1, 2, 3]]), torch.arange(3))
    assert seen == [1]
    model.gradient_checkpointing_enable()
    model.train()
    calls = []
    handle = model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    run(torch.tensor([[1, 2, 3]]), torch.arange(3))
    handle.remove()
    assert calls == [1]


def test_another_models_dropout_or_window_is_left_to_transformers() -> None:
    for name, value in (("attention_dropout", 0.1), ("sliding_window", 4), ("hidden_act", "gelu")):
        model = make("mistral, wide heads")
        model.config.sliding_window = None
        assert fast.body(model) is not None
        setattr(model.config, name, value)
        assert fast.body(model) is None, name
    assert fast.body(make("llama", torch.float16)) is None


@pytest.mark.parametrize("name", LIKE)
def test_in_bfloat16_it_is_as_near_to_float32_as_transformers_is(name: str) -> None:
    """Loss and the factors' gradients, all rounded to bfloat16 on the way, against the same model in float32."""
    found: dict[str, tuple[float, Tensor]] = {}
    for way, dtype in (("exact", torch.float32), ("fast", torch.bfloat16), ("transformers", torch.bfloat16)):
        model = make(name, torch.bfloat16).to(dtype)
        model.config.sliding_window = None
        adapter = filled(lc.attach(model, lc.LoraSpec(targets=("q", "v", "down"), rank=2)))
        objective, batch = rows_of(model)
        assert objective.fast is not None
        if way == "transformers":
            objective.fast = None
        loss = objective.loss(batch)
        loss.backward()
        found[way] = float(loss.detach()), torch.cat([cast(Tensor, p.grad).flatten() for p in adapter.parameters()])
    loss, g = found["exact"]
    off = {way: float((h - g).norm() / g.norm()) for way, (_, h) in found.items()}
    assert found["fast"][0] == pytest.approx(loss, rel=0.01)
    assert off["fast"] < 0.05 and off["fast"] < 2 * off["transformers"], off


@pytest.mark.parametrize("name", LIKE)
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.usefixtures("exact_norms")
def test_the_decoder_gives_transformers_logits(name: str, padding: int) -> None:
    model = make(name).eval()
    model.config.sliding_window = None
    filled(lc.attach(model, lc.LoraSpec(rank=2), name="a"))
    ahead = fast.decoder(model, 3, 8)
    assert ahead is not None
    ids = torch.randint(0, model.config.vocab_size, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[1, :padding] = 0
    with torch.no_grad(), lc.rows(model, ["a", None, "a"]), few_rows(model):
        for begin, end in ((0, 4), (4, 5), (5, 7), (7, 8)):
            mine = ahead(ids[:, begin:end], mask[:, :end])
            position = (mask[:, :end].cumsum(1) - 1).clamp_min(0)
            theirs = model(input_ids=ids[:, :end], attention_mask=mask[:, :end], position_ids=position).logits[:, -1]
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 12), out=st.integers(1, 6), bias=st.booleans(), seed=st.integers(0, 99))
def test_few_rows_are_multiplied_alike(rows: int, out: int, bias: bool, seed: int) -> None:
    x, W, b = draw(1, rows, 4, seed=seed), draw(out, 4), draw(out) if bias else None
    torch.testing.assert_close(few(x, W, b), torch.nn.functional.linear(x, W, b), rtol=1e-12, atol=1e-13)


def test_few_rows_leaves_no_trace() -> None:
    model = tiny("llama")
    lc.attach(model, lc.LoraSpec(rank=2))
    before = {n: dict(m.__dict__) for n, m in model.named_modules()}
    with few_rows(model), few_rows(model):
        pass
    assert before == {n: dict(m.__dict__) for n, m in model.named_modules()}
