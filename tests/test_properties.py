"""What holds for any sizes, rows and numbers: drawn by hypothesis, on one matrix or a tiny model, in float64."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, bits, filled, ids, tiny
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_core as lc
from lora_core.adapted import Adapted, adapt, restore
from lora_core.families import Layout
from lora_core.layers import Factors, Switch
from lora_core.spectra import batched_singular_values

few, many = settings(max_examples=40, deadline=None), settings(max_examples=120, deadline=None)
SCALES = st.floats(-3, 3).filter(lambda s: abs(s) > 1e-3)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class Case:
    """An adapted module, its factors, the rows (as indices) that they act on, and an input."""

    module: nn.Module
    f: Factors
    rows: list[int]
    x: Tensor
    out: int

    @property
    def W(self) -> Tensor:
        """W0 (out, in)"""
        w = cast(Tensor, self.module.weight)
        return w.T if isinstance(self.module, Conv1D) else w

    def lift(self) -> Tensor:
        """P (out, n) with P·d = d on the adapted rows, 0 elsewhere."""
        return torch.eye(self.out, dtype=torch.float64)[:, self.rows]


@st.composite
def cases(draw_: st.DrawFn, kinds: tuple[str, ...] = ("linear", "conv1d")) -> Case:
    i, o, seed = draw_(st.integers(1, 8)), draw_(st.integers(1, 10)), draw_(st.integers(0, 999))
    kind, part = draw_(st.sampled_from(kinds)), draw_(st.sampled_from(["all", "slice", "index"]))
    where: Any = None
    rows = list(range(o))
    if part == "slice":
        first = draw_(st.integers(0, o - 1))
        where = slice(first, draw_(st.integers(first + 1, o)))
        rows = rows[where]
    elif part == "index":
        rows = draw_(st.lists(st.sampled_from(rows), min_size=1, unique=True))
        where = torch.tensor(rows)
    r = draw_(st.integers(1, min(i, len(rows))))
    module = nn.Linear(i, o, bias=draw_(st.booleans())) if kind == "linear" else Conv1D(o, i)
    module.double().requires_grad_(False)
    with torch.no_grad():
        for k, p in enumerate(module.parameters()):
            p.copy_(draw(*p.shape, seed=seed + k))
    x = draw(*draw_(st.sampled_from([(3,), (2, 3), (1, 2, 2)])), i, seed=seed + 7)
    f = Factors(draw(r, i, seed=seed + 8), draw(len(rows), r, seed=seed + 9), draw_(SCALES), where, Switch())
    adapt(module)
    cast(Adapted, module).lora["a:q"] = f
    return Case(module, f, rows, x, o)


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


close: dict[str, Any] = dict(rtol=1e-10, atol=1e-10)


# ---- gradients
@given(cases())
@many
def test_gradients_are_the_closed_forms_for_every_kind_of_layer(c: Case) -> None:
    """∂L/∂B = s·gᵀu on the adapted rows, ∂L/∂A = s·(g·B)ᵀx, ∂L/∂x = g·(W0 + s·P·B·A)."""
    x = c.x.clone().requires_grad_()
    y = c.module(x)
    g = draw(*y.shape, seed=1)
    dx, dA, dB = torch.autograd.grad(y, (x, c.f.A, c.f.B), g)
    s, A, B, mine = c.f.scaling, c.f.A.detach(), c.f.B.detach(), flat(g)[:, c.rows]
    torch.testing.assert_close(dB, s * mine.T @ (flat(c.x) @ A.T), **close)
    torch.testing.assert_close(dA, s * (mine @ B).T @ flat(c.x), **close)
    torch.testing.assert_close(flat(dx), flat(g) @ (c.W + s * c.lift() @ B @ A), **close)


@given(cases(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_autograds_numeric_check_for_every_kind_of_layer(c: Case, anchored: bool) -> None:
    if anchored:
        c.f.anchor(c.f.A.detach() + 0.5, c.f.B.detach() - 0.5)
    x = c.x.clone().requires_grad_()

    def compute(x: Tensor, *_: Tensor) -> Tensor:
        return c.module(x)

    assert torch.autograd.gradcheck(compute, (x, c.f.A, c.f.B))


@given(cases(), st.lists(st.booleans(), min_size=2, max_size=5))
@few
def test_gradients_of_a_mixed_batch_come_from_its_own_rows_alone(c: Case, mine: list[bool]) -> None:
    n, s = len(mine), c.f.switch
    x, chosen = draw(n, 3, c.x.shape[-1], seed=3), [k for k, m in enumerate(mine) if m]
    s.batch, s.rows, s.on = n, torch.tensor(chosen, dtype=torch.long), bool(chosen)
    y = c.module(x)
    s.rows, s.on = None, True
    g = draw(*y.shape, seed=4)
    whole = c.module(x[chosen])
    torch.testing.assert_close(y[chosen], whole, **close)
    if chosen:
        got = torch.autograd.grad(y, (c.f.A, c.f.B), g)
        for a, b in zip(got, torch.autograd.grad(whole, (c.f.A, c.f.B), g[chosen])):
            torch.testing.assert_close(a, b, **close)
    others = [k for k in range(n) if k not in chosen]
    s.on = False
    torch.testing.assert_close(y[others], c.module(x)[others], rtol=0, atol=0)


# ---- rows, orientation
@given(cases())
@many
def test_a_slice_leaves_every_other_row_bit_identical(c: Case) -> None:
    others = [k for k in range(c.out) if k not in c.rows]
    after = c.module(c.x)
    torch.testing.assert_close(flat(after), flat(F.linear(c.x, c.W + c.lift() @ c.f.dense(torch.float64),
                               cast(Any, c.module).bias)), **close)  # fmt: skip
    restore(c.module)
    assert torch.equal(after[..., others], c.module(c.x)[..., others])


@given(cases(("conv1d",)))
@many
def test_conv1d_is_the_transposed_linear_with_gradients(c: Case) -> None:
    linear = nn.Linear(c.x.shape[-1], c.out).double().requires_grad_(False)
    with torch.no_grad():
        linear.weight.copy_(c.W)
        linear.bias.copy_(cast(Any, c.module).bias)
    adapt(linear)
    twin = Factors(c.f.A.detach().clone(), c.f.B.detach().clone(), c.f.scaling, c.f.rows, Switch())
    cast(Adapted, linear).lora["a:q"] = twin
    torch.testing.assert_close(c.module(c.x), linear(c.x), **close)
    for f, m in ((c.f, c.module), (twin, linear)):
        m(c.x).square().sum().backward()
        assert f.A.grad is not None
    torch.testing.assert_close(c.f.A.grad, twin.A.grad, **close)
    torch.testing.assert_close(c.f.B.grad, twin.B.grad, **close)


@given(st.data())
@many
def test_a_fused_weight_is_parted_without_rest_or_overlap(data: st.DataObject) -> None:
    size, groups = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    name = data.draw(st.sampled_from(["concat", "groups", "codegen", "halves"]))
    each = data.draw(st.integers(1, 3))
    full = {"codegen": 12 * groups * size, "halves": 2 * size}.get(name, (each * groups + 2 * groups) * size)
    whiches = (0, 1) if name == "halves" else (0, 1, 2)
    parts = [np.arange(full)[Layout(name, w, each * groups, groups, full).rows()] for w in whiches]
    assert sorted(np.concatenate(parts).tolist()) == list(range(full))
    if name in ("concat", "groups"):
        assert [len(p) for p in parts] == [each * groups * size, groups * size, groups * size]


# ---- scaling, and what ΔW does not depend on
@given(st.integers(1, 64), st.floats(0.01, 1e3), st.floats(0.1, 10))
@many
def test_scaling_laws(r: int, alpha: float, c: float) -> None:
    plain, root = (lc.LoraSpec(rank=r, alpha=alpha, scaling=s) for s in ("alpha/r", "alpha/sqrt(r)"))
    assert plain.scale() == alpha / r and root.scale() == alpha / math.sqrt(r)
    assert root.scale() == pytest.approx(plain.scale() * math.sqrt(r))
    assert plain.scale(r, c * alpha) == pytest.approx(c * plain.scale())
    assert plain.scale(2 * r, 2 * alpha) == plain.scale()
    assert root.scale(4 * r, 2 * alpha) == root.scale()


@given(st.integers(1, 8), st.floats(0.5, 40), st.sampled_from(["alpha/r", "alpha/sqrt(r)"]), st.integers(0, 9))
@few
def test_the_update_is_proportional_to_alpha(r: int, alpha: float, scaling: Any, seed: int) -> None:
    model = tiny("llama", dtype=torch.float64)
    got = []
    for a in (alpha, 3 * alpha):
        adapter = filled(lc.attach(model, lc.LoraSpec(targets=("q",), rank=r, alpha=a, scaling=scaling)), seed)
        f = adapter.factors("model.layers.0.self_attn.q_proj")
        s = a / r if scaling == "alpha/r" else a / math.sqrt(r)
        torch.testing.assert_close(f.dense(torch.float64), s * f.B.detach() @ f.A.detach(), **close)
        got.append(f.dense(torch.float64))
        adapter.detach()
    torch.testing.assert_close(got[1], 3 * got[0], **close)


@given(cases(), st.integers(0, 99))
@many
def test_only_the_product_of_the_factors_counts(c: Case, seed: int) -> None:
    """(R·A, B·R⁻¹) is the same ΔW, the same outputs, the same singular values."""
    r = c.f.A.shape[0]
    R = torch.linalg.qr(draw(r, r, seed=seed))[0] * torch.linspace(0.3, 3, r, dtype=torch.float64)
    before, dense = c.module(c.x), c.f.dense(torch.float64)
    d = lc.Delta(c.f.B.detach().clone(), c.f.A.detach().clone(), c.f.scaling)
    with torch.no_grad():
        c.f.A.copy_(R @ c.f.A)
        c.f.B.copy_(c.f.B @ torch.linalg.inv(R))
    torch.testing.assert_close(c.module(c.x), before, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(c.f.dense(torch.float64), dense, rtol=1e-9, atol=1e-9)
    e = lc.Delta(c.f.B.detach(), c.f.A.detach(), c.f.scaling)
    top = float(d.singular_values()[0])
    torch.testing.assert_close(e.singular_values(), d.singular_values(), rtol=0, atol=1e-9 * top)
    torch.testing.assert_close(e.balanced().dense(), d.dense(), rtol=0, atol=1e-9 * top)


# ---- the factored SVD
@given(st.integers(1, 12), st.integers(1, 12), st.data())
@many
def test_factored_svd_finds_the_singular_values_that_were_put_in(o: int, i: int, data: st.DataObject) -> None:
    """Tiny, huge, repeated and zero ones, for any r from 1 to min(out, in); relative to the largest."""
    r = data.draw(st.one_of(st.just(1), st.just(min(o, i)), st.integers(1, min(o, i))))
    numbers = st.sampled_from([0.0, 1e-150, 1e-12, 1.0, 1.0, 1.0 + 1e-13, 3.0, 1e12, 1e150])
    sigma = sorted(data.draw(st.lists(numbers, min_size=r, max_size=r)), reverse=True)
    seed = data.draw(st.integers(0, 99))
    U, V = (torch.linalg.qr(draw(n, r, seed=seed + n))[0] for n in (o, i))
    S = torch.tensor(sigma, dtype=torch.float64)
    d = lc.Delta(U * S, V.T, 1.0)
    tolerance: dict[str, Any] = dict(rtol=0, atol=1e-10 * sigma[0])
    torch.testing.assert_close(d.singular_values(), S, **tolerance)
    torch.testing.assert_close(torch.linalg.svdvals(d.dense())[:r], S, **tolerance)
    got = batched_singular_values({"x": (d.B.numpy(), d.A.numpy(), 1.0)})["x"]
    np.testing.assert_allclose(got, sigma, **tolerance)
    u, s, vh = d.svd()
    torch.testing.assert_close((u * s) @ vh, d.dense(), **tolerance)
    for k in (0, 1, r):
        left = (d - d.truncate(k)).singular_values()[: max(1, r - k)] if k < r else torch.zeros(1, dtype=torch.float64)
        want = S[k] if k < r else torch.tensor(0.0, dtype=torch.float64)
        torch.testing.assert_close(left[0], want, rtol=0, atol=1e-9 * sigma[0])


# ---- whole models
@given(st.sampled_from(FAMILIES), st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
       st.sampled_from(["q", "v", "o", "down"]), st.floats(1e-3, 50), st.integers(0, 99))  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_unmerge_gives_back_every_bit_whatever_the_size_of_the_update(
    family: str, dtype: torch.dtype, target: str, std: float, seed: int
) -> None:
    model = tiny(family, seed % 3, dtype)
    weights = bits(model)
    a = filled(lc.attach(model, lc.LoraSpec(targets=(target,), rank=3)), seed, std)
    b = filled(lc.attach(model, lc.LoraSpec(targets=(target, "up"), rank=2), name="b"), seed + 1, std)
    for act in (a.merge, b.merge, a.unmerge, a.merge, b.unmerge, a.unmerge):
        act()
    assert all(torch.equal(v, weights[n]) for n, v in bits(model).items())
    a.merge()
    b.merge()
    b.detach()
    a.detach()
    assert all(torch.equal(v, weights[n]) for n, v in bits(model).items())


@given(st.lists(st.sampled_from(["a", "b", None]), min_size=1, max_size=6))
@few
def test_any_mixture_of_rows_equals_separate_passes(names: list[str | None]) -> None:
    model = tiny("gpt_neox", dtype=torch.float64)
    filled(lc.attach(model, lc.LoraSpec(targets=("q", "up"), rank=3), name="a"), 1)
    filled(lc.attach(model, lc.LoraSpec(targets=("q", "k", "o"), rank=2), name="b"), 2)
    x = ids(len(names))
    with torch.no_grad(), lc.rows(model, names):
        mixed = model(x).logits
    for i, n in enumerate(names):
        lc.switch(model, None, n)
        with torch.no_grad():
            torch.testing.assert_close(mixed[i], model(x[i : i + 1]).logits[0], rtol=0, atol=1e-12)


# ---- specs
NAMES = st.sampled_from(["q", "k", "v", "o", "gate", "up", "down"])
SPECS = st.builds(
    lc.LoraSpec,
    targets=st.lists(NAMES, min_size=1, max_size=4).map(tuple),
    rank=st.integers(1, 65536),
    alpha=st.floats(1e-6, 1e6),
    layers=st.one_of(st.just("all"), st.lists(st.integers(0, 99), min_size=1, max_size=4).map(tuple)),
    scaling=st.sampled_from(["alpha/r", "alpha/sqrt(r)"]),
    init=st.sampled_from(["gaussian", "kaiming", "orthogonal", "pissa", "gradient"]),
    train_A=st.booleans(),
    dropout=st.floats(0, 0.99),
    rank_pattern=st.dictionaries(NAMES, st.integers(1, 999), max_size=3),
    alpha_pattern=st.dictionaries(NAMES, st.floats(1e-3, 1e3), max_size=3),
)


@given(SPECS)
@many
def test_a_spec_goes_through_json_and_pickle_unchanged(spec: lc.LoraSpec) -> None:
    assert lc.LoraSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    again = pickle.loads(pickle.dumps(spec))
    assert again == spec and hash(again) == hash(spec)
