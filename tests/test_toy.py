"""The toy of the Play tab: what its presets claim."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lora_core.toy import D, K, Toy, bf16, normals, swaps, train


def test_both_zero_never_learns() -> None:
    assert set(train(Toy(init="none"), 100).loss) == {1.0}


@pytest.mark.parametrize("init", ["A", "B"])
def test_one_factor_at_zero_starts_at_the_base_model_and_learns(init: str) -> None:
    film = train(Toy(init=init, std=0.2), 120)
    assert film.loss[0] == 1.0 and film.loss[-1] < 0.01


def test_both_random_starts_from_a_broken_model() -> None:
    assert train(Toy(init="both", std=0.5), 0).loss[0] > 3


@pytest.mark.parametrize("r", [1, 2, 4, 8])
def test_low_rank_ends_at_the_energy_of_the_rest(r: int) -> None:
    film = train(Toy(r=r, alpha=r, rstar=8, spectrum="flat"), 250)
    assert film.loss[-1] == pytest.approx(1 - r / 8, abs=1e-6)


def test_the_largest_direction_is_learnt_first() -> None:
    """How far the second is when the first stands at 90 %; a start that nearly misses the first is rare."""
    second = []
    for seed in range(20):
        film = train(Toy(seed=seed), 60)
        shares = np.array([film.shares(t) for t in range(61)])
        second.append(shares[np.argmax(shares[:, 0] > 0.9), 1])
        full = np.einsum("id,dk,ik->i", film.problem.U, film.F[30], film.problem.V) / film.problem.sigma
        assert np.allclose(full, 1 - 0.95**30)
    assert np.median(second) < 0.1 and np.mean(np.array(second) <= 0.25) >= 0.9


def test_under_adam_the_scale_and_the_rate_are_one_thing() -> None:
    """α × 4, A's start and the rate ÷ 2: the same to the bit, since powers of two are exact."""
    a = Toy(opt="adam", std=0.2, eps=0.0)
    b = replace(a, alpha=16.0, rate=a.rate / 2, std=a.std / 2)
    assert train(a, 100).loss == train(b, 100).loss


def test_full_rank_reaches_full_fine_tuning() -> None:
    gap = {}
    for r in (8, 16):
        film = train(Toy(r=r, alpha=r, rstar=16, spectrum="linear"), 3000)
        gap[r] = float(np.linalg.norm(film.X(-1) - film.F[-1]) / np.linalg.norm(film.F[-1]))
    assert gap[16] < 1e-12 and gap[8] == pytest.approx(np.sqrt(204 / 1496), abs=1e-6)


def test_the_true_rank_generalises_best() -> None:
    best = 0
    for seed in range(20):
        held = {}
        for r in (1, 2, 3, 4, 8, 16):
            held[r] = train(Toy(r=r, alpha=r, inputs="samples", std=0.05, rate=0.03, seed=seed), 600).held[-1]
        best += min(held, key=lambda r: held[r]) == 3
    assert best >= 18


def test_swaps_wear_off_bf16() -> None:
    W = swaps(Toy(), 200)
    assert 0.25 < np.mean(W[1] != W[0]) < 0.5
    assert np.linalg.norm(W[200] - W[0]) > 5 * np.linalg.norm(W[1] - W[0])
    two = swaps(Toy(), 20, fresh=False)
    assert np.linalg.norm(two[20] - two[0]) < 0.7 * np.linalg.norm(W[20] - W[0])  # ever new tasks wear more
    fine = swaps(Toy(), 20, dtype="fp32")
    assert np.linalg.norm(fine[20] - fine[0]) < 1e-5 * np.linalg.norm(fine[0])


def test_cutting_afterwards_costs_where_inputs_are_stretched() -> None:
    for inputs, more in (("plain", 1.0), ("stretched", 1.18)):
        large, small = (
            train(Toy(r=r, alpha=r, rstar=8, spectrum="linear", inputs=inputs, rate=0.03), 800) for r in (8, 3)
        )
        U, sigma, Vt = np.linalg.svd(large.X(-1))
        error = large.problem.error
        cut = error((U[:, :3] * sigma[:3]) @ Vt[:3]) / error(np.zeros((D, K)))
        assert cut / small.loss[-1] > more - 1e-3


def test_a_rate_that_is_too_large_diverges_and_ends() -> None:
    assert len(train(Toy(rate=0.95 / 4, std=0.1), 300).loss) == 301
    film = train(Toy(rate=4 / 4, std=0.1), 300)
    assert len(film.loss) < 301 and np.isfinite(film.loss[-2])


def test_numbers_are_normal_and_rounding_is_torch_s() -> None:
    z = normals(3, 1, 100, 200)
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03
    torch = pytest.importorskip("torch")
    assert (bf16(z) == torch.tensor(z).to(torch.float32).to(torch.bfloat16).double().numpy()).all()
