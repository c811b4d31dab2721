"""How alike two adapters' updates are, matrix by matrix: φ (section 7.2) with its Gaussian control. Numpy alone."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from lora_core.errors import UserError

DRAWS, LEVEL = 40, 0.95


def alike(V1: np.ndarray, V2: np.ndarray) -> np.ndarray:
    """φ(k, k) for k = 1, 2, … min(r1, r2) of two sets of orthonormal columns (in, r1) and (in, r2): section 7.2.

    How much of the span of the first k columns of one lies in that of the other; 1 where they are the same.
    """
    if V1.shape[0] != V2.shape[0]:
        raise UserError(f"inputs of {V1.shape[0]} and of {V2.shape[0]} numbers cannot be compared")
    n = min(V1.shape[1], V2.shape[1])
    C = np.square(V1[:, :n].T @ V2[:, :n]).cumsum(0).cumsum(1)
    return np.clip(np.diagonal(C) / np.arange(1, n + 1), 0.0, 1.0)


@lru_cache(maxsize=64)
def chance(in_: int, k: int) -> tuple[float, float]:
    """(mean, what 95 % of draws stay below) of φ(k, k) of two random spans of R^in; the mean is k/in."""
    g = np.random.default_rng(0)

    def span() -> np.ndarray:
        return np.linalg.qr(g.standard_normal((in_, k)))[0]

    found = [float(np.square(span().T @ span()).sum() / k) for _ in range(DRAWS)]
    return min(1.0, k / in_), float(np.quantile(found, LEVEL))
