"""How similar two updates are, and how an update relates to W0 (sections 7.2 and 7.3, appendix G)."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_core.errors import UserError


def _array(x: Any) -> np.ndarray:
    if hasattr(x, "detach"):  # a torch tensor, without importing torch
        x = x.detach().cpu().double().numpy()
    x = np.asarray(x, np.float64)
    if x.ndim != 2:
        raise UserError(f"expected a matrix (r, in); given shape {x.shape}")
    return x


def _top(A: Any, i: int) -> np.ndarray:
    """The first i right-singular vectors of A (r, in), as columns (in, i)."""
    A = _array(A)
    if isinstance(i, bool) or not 1 <= i <= min(A.shape):
        raise UserError(f"{i} directions of a matrix {A.shape[0]}×{A.shape[1]}: possible are 1 to {min(A.shape)}")
    return np.linalg.svd(A, full_matrices=False)[2][:i].T


def _cosines(A1: Any, A2: Any, i: int, j: int) -> np.ndarray:
    """Cosines of the principal angles between the two spans, min(i, j) of them."""
    U1, U2 = _top(A1, i), _top(A2, j)
    if U1.shape[0] != U2.shape[0]:
        raise UserError(
            f"the matrices act on inputs of {U1.shape[0]} and {U2.shape[0]} numbers; they cannot be compared"
        )
    return np.clip(np.linalg.svd(U1.T @ U2, compute_uv=False), 0.0, 1.0)


def phi(A1: Any, A2: Any, i: int, j: int) -> float:
    """φ(A1, A2, i, j) = ‖U1[:, :i]ᵀ·U2[:, :j]‖_F² / min(i, j), in [0, 1]: equation 4 of section 7.2.

    U are the right-singular vectors of A1 (r1, in) and A2 (r2, in), torch or numpy. 1 when one span holds the other,
    0 when they are orthogonal, about max(i, j)/in for random ones.
    """
    c = _cosines(A1, A2, i, j)
    return float((c * c).sum() / min(i, j))


def projection_distance(A1: Any, A2: Any, i: int, j: int) -> float:
    """d = √(p − Σσ²) with p = min(i, j): appendix G. So φ = 1 − d²/p (the appendix prints (1 − d²)/p, a misprint)."""
    c = _cosines(A1, A2, i, j)
    return float(np.sqrt(np.maximum(0.0, (1 - c * c)).sum()))


def geodesic_distance(A1: Any, A2: Any, i: int, j: int) -> float:
    """√Σ arccos²σ, the geodesic distance on the Grassmann manifold, in radians."""
    return float(np.sqrt((np.arccos(_cosines(A1, A2, i, j)) ** 2).sum()))


def amplification(delta: Any, W0: Any, k: int | None = None) -> float:
    """‖ΔW‖_F / ‖Uᵀ·W0·V‖_F with ΔW = U·S·Vᵀ over its own rank (or its first k directions): section 7.3.

    delta: a Delta, with its scaling in it; W0 (out, in), torch or numpy. How much more the update has, along its own
    directions, than the frozen matrix had there. 0 for ΔW = 0.
    """
    U, S, Vh = (x.detach().cpu().double().numpy() for x in delta.double().svd())
    W = _array(W0)
    if W.shape != (U.shape[0], Vh.shape[1]):
        raise UserError(f"ΔW is {U.shape[0]}×{Vh.shape[1]} but W0 is {W.shape[0]}×{W.shape[1]}")
    if not len(S) or S[0] == 0:
        return 0.0
    n = int((S > S[0] * 1e-12 * max(W.shape)).sum())  # directions beyond the numerical rank are noise
    n = min(n, k) if k is not None else n
    along = np.linalg.norm(U[:, :n].T @ W @ Vh[:n].T)
    size = float(np.sqrt((S * S).sum()))
    return float(size / along) if along > 0 else float("inf")
