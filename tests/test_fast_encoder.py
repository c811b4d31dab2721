"""A text classifier's fast path computes what transformers does, with its gradients and its dropout."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fast import agree, draw
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import lora_core as lc
from lora_core import fast_encoder
from lora_core.classification import Classification
from lora_core.kernels import Place

IDS = torch.tensor([[2, 9, 8, 7, 3], [2, 5, 3, 0, 0], [2, 6, 6, 3, 0]])
MASK = (IDS > 0).long()


def bert(dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    torch.manual_seed(0)
    kind: Any = BertConfig
    config = kind(vocab_size=40, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40,
                  max_position_embeddings=16, num_labels=3, **more)  # fmt: skip
    model: Any = BertForSequenceClassification(config)
    return model.to(dtype).eval()


@settings(max_examples=30, deadline=None)
@given(data=st.data(), n=st.integers(1, 6), size=st.integers(1, 4))
def test_place(data: st.DataObject, n: int, size: int) -> None:
    at = torch.tensor(data.draw(st.permutations(range(8)))[:n])
    plain = lambda x, at: torch.eye(8, dtype=x.dtype)[:, at] @ x  # noqa: E731
    agree(lambda x, at: Place.apply(x, at, 8), plain, draw(n, size).requires_grad_(), at)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 3), heads=st.integers(1, 3), asking=st.integers(1, 3), real=st.integers(1, 4))
def test_attention(rows: int, heads: int, asking: int, real: int) -> None:
    q, k, v = (draw(rows, heads, n, 4, seed=n).requires_grad_() for n in (asking, 5, 5))
    mask = (torch.arange(5) < real).long().repeat(rows, 1)
    agree(fast_encoder.attention, fast_encoder.plain_attention, q, k, v, mask, 0.7)


@pytest.mark.parametrize("spec", [
    {"targets": ("q", "v")}, {"targets": ("q", "k", "v", "o", "up", "down"), "full": ("head", "bert.pooler")},
    {"targets": ("v", "norm")}, {"targets": ("embed", "k")}, {"targets": ("down",), "layers": (2,)},
    {"targets": ("q",), "dora": True}])  # fmt: skip
def test_logits_and_gradients_are_transformers_own(spec: dict[str, Any]) -> None:
    model = bert()
    adapter = lc.attach(model, lc.LoraSpec(**{"rank": 2, **spec}))
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.add_(0.1 * draw(*p.shape, seed=i))
    assert fast_encoder.reader(model) is not None
    found = []
    for logits in (fast_encoder.logits(model, IDS, MASK), model(input_ids=IDS, attention_mask=MASK).logits):
        F.cross_entropy(logits, torch.tensor([0, 2, 1])).backward()
        found.append((logits.detach(), [cast(Tensor, p.grad) for p in adapter.parameters()]))
        for p in adapter.parameters():
            p.grad = None
    torch.testing.assert_close(*(y for y, _ in found), rtol=1e-9, atol=1e-12)
    for mine, theirs in zip(*(grads for _, grads in found), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-12)


def test_padding_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = bert(), []
    assert fast_encoder.reader(model) is not None
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: seen.append(x.numel() // x.shape[-1]) or linear(x, *rest))
    fast_encoder.logits(model, IDS, MASK)
    real, rows = int(MASK.sum()), len(IDS)
    last = [real, real, rows, rows, rows, rows]  # keys and values of all, the rest for the first tokens
    assert seen == [real] * 12 + last + [rows, rows]  # and the pooler and the head


@pytest.mark.parametrize("spec", [{}, {"targets": ("q", "bias", "norm")}, {"targets": ("embed", "v")},
                                  {"targets": ("q",), "full": ("head", "bert.pooler")}])  # fmt: skip
def test_rows_with_their_own_adapters(spec: dict[str, Any]) -> None:
    model = bert()
    for name in ("a", "b"):
        adapter = lc.attach(model, lc.LoraSpec(**{"rank": 2, **spec}), name=name)
        with torch.no_grad():
            for i, p in enumerate(adapter.parameters()):
                p.add_(0.1 * draw(*p.shape, seed=i + len(name)))
    for names in (["a", None, "b"], ["a", "b", "b"], ["a"] * 3):
        with torch.no_grad(), lc.rows(model, names):
            want = model(input_ids=IDS, attention_mask=MASK).logits
            torch.testing.assert_close(fast_encoder.logits(model, IDS, MASK), want, rtol=1e-9, atol=1e-12)


def test_every_dropout_is_where_transformers_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn ones cannot be compared, so each is replaced by a factor, that of attention by another."""
    model = bert(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2, attn_implementation="eager")
    assert fast_encoder.reader(model) is not None
    model.train()
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x * 0.9 if self.training else x)
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True, inplace=False: x * (1 - p) if training else x)
    mine = fast_encoder.logits(model, IDS, MASK)
    want = model(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-12)
    model.eval()
    assert not torch.allclose(fast_encoder.logits(model, IDS, MASK), want)


def test_it_gives_way_to_hooks_checkpointing_and_other_methods() -> None:
    model = bert()
    for part in (model.bert, model.bert.embeddings, model.bert.encoder.layer[1].attention.self,
                 model.bert.encoder.layer[2].output.dense):
        handle = part.register_forward_hook(lambda *_: None)
        assert fast_encoder.reader(model) is None
        handle.remove()
        assert fast_encoder.reader(model) is not None
    model.gradient_checkpointing_enable()
    assert fast_encoder.reader(model) is None
    assert fast_encoder.reader(bert(is_decoder=True)) is None and fast_encoder.reader(nn.Linear(2, 2)) is None


def test_a_model_that_computes_otherwise_is_left_to_transformers() -> None:
    model = bert()
    attn = model.bert.encoder.layer[1].attention.self
    attn.forward = lambda h, *_, **__: (2 * h, None)
    assert fast_encoder.reader(model) is None
    want = model(input_ids=IDS, attention_mask=MASK).logits
    assert torch.equal(fast_encoder.logits(model, IDS, MASK), want)


def test_in_bfloat16_it_is_as_near_to_float32_as_transformers_is() -> None:
    exact, half = bert(torch.float32), bert(torch.bfloat16)
    exact.load_state_dict(half.state_dict())
    with torch.no_grad():
        want = exact(input_ids=IDS, attention_mask=MASK).logits
        mine = fast_encoder.logits(half, IDS, MASK).float()
        theirs = half(input_ids=IDS, attention_mask=MASK).logits.float()
    assert (mine - want).norm() <= 2 * (theirs - want).norm() + 1e-2 * want.norm()


def test_the_objective_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizer_fixture import tiny_tokenizer

    model = bert()
    objective = Classification(model, tiny_tokenizer())
    called = []
    monkeypatch.setattr(fast_encoder, "_run", lambda *a, run=fast_encoder._run: called.append(1) or run(*a))
    objective.logits(IDS, MASK)
    assert called
