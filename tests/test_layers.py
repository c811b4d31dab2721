"""The arithmetic on one matrix: values and gradients against dense formulas, in float64."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_core.adapted import Adapted, adapt, restore
from lora_core.layers import Factors, Fused, Switch, Together, mask_of
from lora_core.starts import initial_A

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.integers(1, 6))  # tokens, in, out, r


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


@given(SIZES, st.floats(-3, 3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_fused_equals_plain_and_the_closed_forms(sizes: tuple[int, int, int, int], s: float, biased: bool) -> None:
    n, i, o, r = sizes
    W0, bias = draw(o, i), draw(o, seed=5) if biased else None
    x, A, B = (t.requires_grad_() for t in (draw(n, i, seed=1), draw(r, i, seed=2), draw(o, r, seed=3)))
    g = draw(n, o, seed=4)
    y = cast(torch.Tensor, Fused.apply(x, W0, bias, [(0, len(x), s)], A, B))
    torch.testing.assert_close(y, x @ (W0 + s * B @ A).T + (0 if bias is None else bias), rtol=1e-10, atol=1e-10)
    dx, dA, dB = torch.autograd.grad(y, (x, A, B), g)
    u = x @ A.T
    torch.testing.assert_close(dB, s * g.T @ u, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dA, s * (g @ B).T @ x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dx, g @ (W0 + s * B @ A), rtol=1e-10, atol=1e-10)


def test_fused_passes_autograds_numeric_check() -> None:
    x, A, B = (t.requires_grad_() for t in (draw(2, 3, 5), draw(2, 5, seed=1), draw(4, 2, seed=2)))
    assert torch.autograd.gradcheck(lambda x, A, B: Fused.apply(x, draw(4, 5, seed=3), None, [(0, 6, 0.5)], A, B),
                                    (x, A, B))  # fmt: skip


@given(st.integers(1, 4), st.integers(1, 3), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_together_is_one_pair_after_the_other(each: int, i: int, ranks: list[int], everybody: bool) -> None:
    """Pairs with rows of their own, and one that acts on all of them."""
    n, o = len(ranks), 5
    ranks = [*ranks, 2] if everybody else ranks
    W0, x, g = draw(o, i), draw(n * each, i, seed=1).requires_grad_(), draw(n * each, o, seed=4)
    acting, cuts = [], []
    for k, r in enumerate(ranks):
        switch = Switch()
        switch.batch, switch.rows = n, slice(k, k + 1) if k < n else None
        acting.append(Factors(draw(r, i, seed=2 * k), draw(o, r, seed=2 * k + 1), 0.3 + k, None, switch))
        cuts.append((k * each, (k + 1) * each, 0.3 + k) if k < n else (0, n * each, 0.3 + k))
    factors = [p for f in acting for p in (f.A, f.B)]
    mask = mask_of(acting, ranks, torch.device("cpu"))
    assert mask is mask_of(acting, ranks, torch.device("cpu"))
    found = cast(torch.Tensor, Together.apply(x, W0, None, mask.double(), *factors))
    want = cast(torch.Tensor, Fused.apply(x, W0, None, cuts, *factors))
    # The mask is float32, and so are the s in it.
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(y, (x, *factors), g) for y in (found, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


def layers(kind: str) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    module: nn.Module = nn.Linear(6, 12) if kind == "linear" else Conv1D(12, 6)
    return module.double().requires_grad_(False), 12


def rows_of(kind: str) -> Any:
    return {"all": None, "slice": slice(4, 8), "index": torch.tensor([0, 3, 5, 11])}[kind]


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("part", ["all", "slice", "index"])
def test_an_adapted_module_is_its_dense_self(kind: str, part: str) -> None:
    module, out = layers(kind)
    x, rows = draw(2, 3, 6), rows_of(part)
    before = module(x)
    n = out if rows is None else len(range(out)[rows]) if isinstance(rows, slice) else len(rows)
    f = Factors(draw(2, 6, seed=1), draw(n, 2, seed=2), 0.7, rows, Switch())
    adapt(module)
    cast(Adapted, module).lora["a:q"] = f
    after = module(x)
    full = torch.zeros(out, 6, dtype=torch.float64)
    full[slice(None) if rows is None else rows] = f.dense(torch.float64)
    torch.testing.assert_close(after - before, x @ full.T, rtol=1e-10, atol=1e-10)
    others = [i for i in range(out) if full[i].abs().sum() == 0]
    assert torch.equal(after[..., others], before[..., others]), "a slice leaves the other rows' output bit-identical"
    restore(module)
    assert type(module) in (nn.Linear, Conv1D) and torch.equal(module(x), before)


def test_conv1d_equals_transposed_linear() -> None:
    conv, _ = layers("conv1d")
    linear = nn.Linear(6, 12).double().requires_grad_(False)
    with torch.no_grad():
        linear.weight.copy_(cast(Any, conv).weight.T)
        linear.bias.copy_(cast(Any, conv).bias)
    x = draw(4, 6)
    for m in (conv, linear):
        adapt(m)
        cast(Adapted, m).lora["a:q"] = Factors(draw(3, 6, seed=1), draw(12, 3, seed=2), 2.0, None, Switch())
    torch.testing.assert_close(conv(x), linear(x), rtol=1e-12, atol=1e-12)


def test_fused_and_plain_path_give_the_same_gradients_in_a_module() -> None:
    x, grads = draw(2, 3, 6), []
    for training_weight in (False, True):  # a weight that trains too takes the plain path
        module, _ = layers("linear")
        module.weight.requires_grad_(training_weight)  # pyright: ignore
        f = Factors(draw(2, 6, seed=1), draw(12, 2, seed=2), 0.7, None, Switch())
        adapt(module)
        cast(Adapted, module).lora["a:q"] = f
        F.gelu(module(x)).sum().backward()
        grads.append((f.A.grad, f.B.grad))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_dropout_acts_on_x_in_training_only() -> None:
    module, _ = layers("linear")
    adapt(module)
    cast(Adapted, module).lora["a:q"] = Factors(
        draw(2, 6, seed=1), draw(12, 2, seed=2), 1.0, None, Switch(), dropout=0.5
    )
    x = draw(64, 6)
    module.eval()
    assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))


def test_factors_stay_out_of_the_state_dict_both_ways() -> None:
    module, _ = layers("linear")
    keys = set(module.state_dict())
    adapt(module)
    cast(Adapted, module).lora["a:q"] = Factors(draw(2, 6), draw(12, 2), 1.0, None, Switch())
    assert set(module.state_dict()) == keys
    module.load_state_dict(module.state_dict(), strict=True)
    assert {n for n, _ in module.named_parameters()} > keys, "but optimisers see them"


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_initial_A(init: str) -> None:
    A = initial_A(init, 64, 900, torch.Generator().manual_seed(0))
    assert torch.equal(A, initial_A(init, 64, 900, torch.Generator().manual_seed(0)))
    spread = {"gaussian": 1 / 30, "kaiming": 1 / 30 / 3**0.5}[init]
    assert abs(float(A.mean())) < 1e-3 and abs(float(A.std()) / spread - 1) < 0.02
    if init == "kaiming":
        assert float(A.abs().max()) <= 1 / 30
