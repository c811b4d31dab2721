"""Spectra and subspaces against dense linear algebra and known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, filled, targets_of, tiny

import lora_core as lc
from lora_core.spectra import batched_singular_values, energy


@given(
    st.integers(1, 30), st.integers(1, 30), st.integers(1, 9), st.integers(0, 99), st.sampled_from([1e-150, 1.0, 1e150])
)
@settings(max_examples=80, deadline=None)
def test_factored_equals_dense(o: int, i: int, r: int, seed: int, size: float) -> None:
    g = np.random.default_rng(seed)
    B, A = g.standard_normal((o, r)) * size, g.standard_normal((r, i))
    got = batched_singular_values({"x": (B, A, 0.7)})["x"]
    want = np.linalg.svd((0.7 * B / size) @ A, compute_uv=False)[: len(got)] * size
    assert len(got) == min(o, i, r)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * want[0])


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e7, 1e12, np.inf])
def test_badly_conditioned_and_rank_deficient_factors(condition: float) -> None:
    g = np.random.default_rng(0)
    Q, _ = np.linalg.qr(g.standard_normal((40, 6)))
    B = Q * np.geomspace(1, 1 / condition, 6) if np.isfinite(condition) else Q * [1, 1, 1, 0, 0, 0]
    A = g.standard_normal((6, 30))
    got = batched_singular_values({"a": (B, A, 1.0), "b": (g.standard_normal((40, 6)), A, 1.0)})["a"]
    want = np.linalg.svd(B @ A, compute_uv=False)[:6]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * want[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_of_an_adapter(family: str) -> None:
    model = tiny(family)
    a = lc.attach(model, lc.LoraSpec(targets=targets_of(model), rank=4, rank_pattern={"o": 2}))
    assert all(s.norm == 0 == s.stable_rank for s in lc.spectra(a).values()), "a fresh adapter changes nothing"
    filled(a)
    found = lc.spectra(a)
    assert list(found) == list(a.deltas())
    for key, s in found.items():
        dense = torch.linalg.svdvals(a.delta(key).double().dense())[: s.rank].numpy()
        np.testing.assert_allclose(s.singular_values, dense, rtol=0, atol=1e-9 * dense[0])
        assert s.norm == pytest.approx(float(np.sqrt((dense**2).sum())))
        assert s.stable_rank == pytest.approx(float((dense**2).sum() / dense[0] ** 2))
        assert (s.target, s.layer) == (a.sites[key].target, a.sites[key].layer)
        assert s.to_dict()["rank"] == a.factors(key).A.shape[0]


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_the_chain_of_effective_ranks(sigma: list[float]) -> None:
    """stable ≤ participation ≤ entropy(σ²) ≤ Roy–Vetterli ≤ rank, always."""
    r = len(sigma)
    model = tiny("llama")
    a = lc.attach(model, lc.LoraSpec(targets=("model.layers.0.mlp.gate_proj",), rank=r, alpha=r))
    f = a.factors("model.layers.0.mlp.gate_proj")
    with torch.no_grad():
        f.A.copy_(torch.eye(r, 32))
        f.B.copy_(torch.eye(48, r) * torch.tensor(sorted(sigma, reverse=True)))
    (s,) = lc.spectra(a).values()
    chain = [1, s.stable_rank, s.participation, s.entropy_rank, s.roy_vetterli, r]
    assert all(x <= y * (1 + 1e-9) for x, y in zip(chain, chain[1:])), chain
    assert 1 <= s.energy_90 <= s.energy_99 <= r
    share = energy(s.singular_values)
    assert share[s.energy_90 - 1] >= 0.9 - 1e-9 and (s.energy_90 == 1 or share[s.energy_90 - 2] < 0.9)


def test_same_norm_random() -> None:
    s = lc.same_norm_random(576, 192, 8, 2.5)
    assert len(s) == 8 and np.sqrt((s**2).sum()) == pytest.approx(2.5) and (np.diff(s) <= 0).all()
    assert np.array_equal(s, lc.same_norm_random(576, 192, 8, 2.5))
    assert s[0] / s[-1] < 2.5, "a random product of thin factors spreads its energy nearly evenly"


def rand(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_phi_on_known_spans() -> None:
    Q, _ = np.linalg.qr(rand(40, 12))
    A, B = Q[:, :6].T * np.arange(6, 0, -1)[:, None], Q[:, 6:].T
    assert lc.phi(A, A, 4, 4) == pytest.approx(1) and lc.phi(A, A, 2, 6) == pytest.approx(1)
    assert lc.phi(A, B, 6, 6) == pytest.approx(0, abs=1e-12)
    assert lc.phi(torch.tensor(A), torch.tensor(A), 3, 3) == pytest.approx(1)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_phi_is_symmetric_and_agrees_with_the_distances(i: int, j: int, seed: int) -> None:
    A, B = rand(6, 20, seed=seed), rand(5, 20, seed=seed + 1)
    f, p = lc.phi(A, B, i, j), min(i, j)
    assert 0 <= f <= 1 and f == pytest.approx(lc.phi(B, A, j, i), abs=1e-12)
    assert f == pytest.approx(1 - lc.projection_distance(A, B, i, j) ** 2 / p, abs=1e-12)
    U1, U2 = (np.linalg.svd(X, full_matrices=False)[2][:n].T for X, n in ((A, i), (B, j)))
    assert f == pytest.approx(np.linalg.norm(U1.T @ U2) ** 2 / p, abs=1e-12), "the definition, section 7.2"
    assert lc.geodesic_distance(A, B, i, j) >= lc.projection_distance(A, B, i, j) - 1e-12


def test_phi_of_random_matrices_and_of_the_update() -> None:
    mean = np.mean([lc.phi(rand(64, 768, seed=s), rand(64, 768, seed=s + 50), 64, 64) for s in range(4)])
    assert mean == pytest.approx(64 / 768, rel=0.05)
    A, B = rand(8, 40), rand(30, 8, seed=3)
    delta, other = B @ A, rand(8, 40, seed=9)
    assert lc.phi(A, other, 8, 8) == pytest.approx(lc.phi(delta, other, 8, 8)), "full rank: A spans what ΔW spans"
    assert abs(lc.phi(A, other, 2, 8) - lc.phi(delta, other, 2, 8)) > 1e-3, "but A's top directions are not ΔW's"


def test_amplification() -> None:
    U, V = np.linalg.qr(rand(30, 4))[0], np.linalg.qr(rand(20, 4, seed=1))[0]
    W0 = 0.5 * U @ V.T + (np.eye(30) - U @ U.T) @ rand(30, 20, seed=2)
    d = lc.Delta(torch.tensor(U * 2.0), torch.tensor(V.T))
    # Along its own directions W0 has 0.5 in each of four, and the update 2: amplified four times.
    assert lc.amplification(d, W0) == pytest.approx(4.0)
    assert lc.amplification(3.0 * d, torch.tensor(W0)) == pytest.approx(12.0), "linear in ΔW"
    assert lc.amplification(lc.Delta(d.B * 0, d.A), W0) == 0.0
    # A random update sees about r·‖W0‖/√(out·in) of W0 (section 7.3's random column).
    W, sees = rand(300, 200, seed=3), []
    for s in range(5):
        r = lc.Delta(torch.tensor(rand(300, 16, seed=s)), torch.tensor(rand(16, 200, seed=s + 9)))
        sees.append(float(r.norm()) / lc.amplification(r, W))
    assert np.mean(sees) == pytest.approx(16 * np.linalg.norm(W) / np.sqrt(300 * 200), rel=0.1)


def test_bad_input_says_what_is_possible() -> None:
    with pytest.raises(lc.UserError, match="possible are 1 to 4"):
        lc.phi(rand(4, 9), rand(4, 9), 5, 1)
    with pytest.raises(lc.UserError, match="cannot be compared"):
        lc.phi(rand(4, 9), rand(4, 8), 1, 1)
    with pytest.raises(lc.UserError, match="expected a matrix"):
        lc.phi(rand(4), rand(4, 8), 1, 1)
    with pytest.raises(lc.UserError, match="but W0 is"):
        lc.amplification(lc.Delta(torch.zeros(4, 2), torch.zeros(2, 5)), rand(5, 4))
