"""How an update lies in the matrix that it updates (section 7.3, Table 7): numpy alone, from the factors and W0.

With ΔW = U·S·Vᵀ over its own rank r, ‖Uᵀ·W0·V‖_F is how much of W0 acts along ΔW's directions. Table 7 sets three such
numbers side by side: with ΔW's directions, with random ones, and with W0's own strongest ones.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lora_core.errors import UserError

NOTHING = 1e-12  # of the largest singular value: rounding, not a direction


@dataclass(frozen=True, kw_only=True)
class Beside:
    """One ΔW (out, in) beside its W0, both with their scaling in them.

    directions     r, the directions that ΔW has
    norm           ‖ΔW‖_F; base_norm: ‖W0‖_F
    along          ‖Uᵀ·W0·V‖_F with ΔW's directions
    random         the same with r random ones, in root mean square: r·‖W0‖_F/√(out·in)
    top            the same with W0's own r strongest ones: the most that is possible, √(σ₁² + … + σ_r²) of W0
    amplification  norm/along: how much more ΔW has along its directions than W0 had there
    overlap        along/top, from 0 to 1: how far ΔW's directions are W0's strongest ones
    """

    directions: int
    norm: float
    base_norm: float
    along: float
    random: float
    top: float
    amplification: float
    overlap: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def svd(B: np.ndarray, A: np.ndarray, scaling: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U (out, n), σ (n,), V (in, n) of scaling·B·A for B (out, r), A (r, in), n = min(r, out, in), in float64.

    Signs are fixed: the entry of each column of V with the largest magnitude is positive.
    """
    qb, rb = np.linalg.qr(np.asarray(B, np.float64))
    qa, ra = np.linalg.qr(np.asarray(A, np.float64).T)
    u, s, vt = np.linalg.svd(scaling * (rb @ ra.T), full_matrices=False)
    U, V = qb @ u, qa @ vt.T
    sign = np.sign(V[np.abs(V).argmax(0), np.arange(V.shape[1])]) if V.size else np.ones(V.shape[1])
    return U * sign, s, V * sign


def rank_of(sigma: np.ndarray, shape: tuple[int, int]) -> int:
    """How many singular values are more than rounding."""
    return int((sigma > sigma.max(initial=0.0) * NOTHING * max(shape)).sum())


def beside(U: np.ndarray, sigma: np.ndarray, V: np.ndarray, W0: np.ndarray, base_sigma: np.ndarray) -> Beside:
    """ΔW = U·diag(σ)·Vᵀ beside W0 (out, in), whose singular values are known; all zeros where ΔW = 0."""
    if W0.shape != (U.shape[0], V.shape[0]):
        raise UserError(f"ΔW is {U.shape[0]}×{V.shape[0]} but W0 is {W0.shape[0]}×{W0.shape[1]}")
    n = rank_of(sigma, W0.shape)
    whole = float(np.linalg.norm(W0))
    # V first: the product with r columns is the cheap one, in W0's own precision; W0 can be large
    along = float(np.linalg.norm(U[:, :n].T @ (W0 @ V[:, :n].astype(W0.dtype)).astype(np.float64))) if n else 0.0
    top = float(np.sqrt(np.square(base_sigma[:n].astype(np.float64)).sum()))
    norm = float(np.sqrt(np.square(sigma).sum()))
    return Beside(directions=n, norm=norm, base_norm=whole, along=along, top=top,
                  random=n * whole / float(np.sqrt(W0.shape[0] * W0.shape[1])),
                  amplification=norm / along if along > 0 else 0.0 if n == 0 else float("inf"),
                  overlap=along / top if top > 0 else 0.0)  # fmt: skip


def inside(D: np.ndarray, base: np.ndarray, k: int) -> np.ndarray:
    """φ of the first k columns of D (n, r) and the first 1, 2, … columns of `base` (n, m), as (m,): section 7.2.

    Where j ≥ k that is the share of ΔW's first k directions that lies in the span of W0's first j; for random
    directions it is max(j, k)/n.
    """
    C = np.square(D[:, :k].T @ base).sum(0).cumsum()
    return np.clip(C / np.minimum(np.arange(1, base.shape[1] + 1), k), 0.0, 1.0)
