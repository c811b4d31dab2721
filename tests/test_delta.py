"""ΔW as factors against the dense matrix, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.delta import Delta

SHAPES = st.tuples(st.integers(1, 14), st.integers(1, 14), st.integers(1, 8))


def make(o: int, i: int, r: int, seed: int = 0, s: float = 0.5, size: float = 1.0) -> Delta:
    g = torch.Generator().manual_seed(seed)
    B, A = (torch.randn(*n, generator=g, dtype=torch.float64) * size for n in ((o, r), (r, i)))
    return Delta(B, A, s)


@given(SHAPES, st.integers(0, 99), st.sampled_from([1e-12, 1e-3, 1.0, 1e6]))
@settings(max_examples=80, deadline=None)
def test_svd_is_the_dense_one(shape: tuple[int, int, int], seed: int, size: float) -> None:
    d = make(*shape, seed=seed, size=size)
    U, S, Vh = d.svd()
    n = min(shape)
    assert U.shape == (shape[0], n) and S.shape == (n,) and Vh.shape == (n, shape[1])
    dense = torch.linalg.svdvals(d.dense())[:n]
    top = float(dense[0])
    torch.testing.assert_close(S, dense, rtol=0, atol=1e-10 * top)
    torch.testing.assert_close(d.singular_values(), dense, rtol=0, atol=1e-10 * top)
    torch.testing.assert_close((U * S) @ Vh, d.dense(), rtol=0, atol=1e-10 * top)
    eye = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(U.T @ U, eye, rtol=0, atol=1e-10)
    torch.testing.assert_close(Vh @ Vh.T, eye, rtol=0, atol=1e-10)
    assert float(d.norm()) == pytest.approx(float(d.dense().norm()), rel=1e-10)


@pytest.mark.parametrize("sigma", [[3.0, 3.0, 3.0], [1.0, 1e-9, 0.0], [1e8, 1.0, 1e-8], [0.0, 0.0, 0.0]])
def test_repeated_zero_huge_and_tiny_singular_values(sigma: list[float]) -> None:
    U = torch.linalg.qr(torch.randn(9, 3, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(7, 3, dtype=torch.float64))[0]
    d = Delta(U * torch.tensor(sigma, dtype=torch.float64), V.T)
    want = torch.tensor(sorted(sigma, reverse=True), dtype=torch.float64)
    torch.testing.assert_close(d.singular_values(), want, rtol=0, atol=1e-10 * max(1e-300, max(sigma)))


@given(SHAPES, st.integers(0, 8))
@settings(max_examples=50, deadline=None)
def test_truncate_is_the_best_of_its_rank(shape: tuple[int, int, int], k: int) -> None:
    d = make(*shape)
    cut = d.truncate(k)
    S = torch.linalg.svdvals(d.dense())
    assert cut.rank == min(k, *shape)
    # Eckart–Young: the error is exactly the energy that was cut off, and no rank-k matrix does better.
    assert float((d.dense() - cut.dense()).norm()) == pytest.approx(float(S[k:].norm()), abs=1e-10 * float(S[0]))
    torch.testing.assert_close(cut.B.norm(dim=0), cut.A.norm(dim=1), rtol=1e-6, atol=1e-12)


@given(SHAPES, st.floats(-4, 4), st.floats(0.1, 4))
@settings(max_examples=50, deadline=None)
def test_algebra_is_that_of_the_matrices(shape: tuple[int, int, int], a: float, c: float) -> None:
    x, y = make(*shape, seed=1), make(shape[0], shape[1], 3, seed=2, s=-2.0)
    X, Y = x.dense(), y.dense()
    for got, want in (
        (x + y, X + Y),
        (x - y, X - Y),
        (a * x, a * X),
        (x * a, a * X),
        (x / c, X / c),
        (-x, -X),
        (x.T, X.T),
    ):
        torch.testing.assert_close(got.dense(), want, rtol=1e-10, atol=1e-10)
    v = torch.randn(shape[1], 2, dtype=torch.float64)
    torch.testing.assert_close(x @ v, X @ v, rtol=1e-10, atol=1e-10)


def test_it_is_defined_on_the_matrix_not_the_factors() -> None:
    d = make(8, 6, 3)
    R = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0] * torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)
    other = Delta(d.B @ torch.linalg.inv(R), R @ d.A, d.scaling)
    torch.testing.assert_close(d.singular_values(), other.singular_values(), rtol=1e-10, atol=0)
    torch.testing.assert_close(d.truncate(2).dense(), other.truncate(2).dense(), rtol=1e-9, atol=1e-12)


def test_float32_keeps_its_dtype_and_float64s_accuracy() -> None:
    d = make(40, 30, 5).to(torch.float32)
    assert {t.dtype for t in (*d.svd(), d.dense(), d.norm(), d.singular_values())} == {torch.float32}
    exact = np.linalg.svd(d.double().dense().numpy(), compute_uv=False)[:5]
    np.testing.assert_allclose(d.double().singular_values().numpy(), exact, rtol=1e-12)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="share r"):
        Delta(torch.zeros(4, 2), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="cannot add"):
        _ = make(4, 5, 2) + make(5, 4, 2)
    with pytest.raises(ValueError, match="0 or more"):
        make(4, 5, 2).truncate(-1)
