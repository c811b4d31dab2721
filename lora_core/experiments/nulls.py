"""What noise looks like: the controls beside which spectra are read."""

from __future__ import annotations

from functools import cache

import numpy as np

from lora_core.spectra import energy, energy_rank


def ninety(sigma: np.ndarray) -> int:
    """How many directions hold 90 % of Σσ², from singular values, largest first."""
    return energy_rank(energy(sigma), 0.9)


@cache
def gaussian_ninety(out: int, in_: int) -> int:
    """The same for a matrix (out, in) of independent Gaussian numbers, whatever their size."""
    return ninety(np.linalg.svd(np.random.default_rng(0).standard_normal((out, in_)), compute_uv=False))


def noise_edge(norm: float, out: int, in_: int) -> float:
    """The largest σ of a Gaussian matrix (out, in) of that Frobenius norm, for large sides (Marchenko–Pastur)."""
    return norm / (out * in_) ** 0.5 * (out**0.5 + in_**0.5)
