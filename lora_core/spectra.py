"""The singular values of every ΔW of an adapter, and what they say: norms and effective ranks.

All of it from the factors, in float64 and numpy alone: with Aᵀ = Q_A·R_A and B = Q_B·R_B the singular values of
ΔW = s·B·A are those of the r×r matrix s·R_B·R_Aᵀ. Matrices of one shape go through LAPACK as one batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_core.errors import UserError

if TYPE_CHECKING:
    from lora_core.adapter import Adapter
    from lora_core.files import Stored


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The spectrum of one ΔW (out, in) of rank at most `rank`.

    singular_values  σ, largest first
    norm             ‖ΔW‖_F = √Σσ²
    stable_rank      Σσ²/σ₁²: how many directions carry the update, counted softly
    participation    (Σσ²)²/Σσ⁴
    entropy_rank     exp H(σ²/Σσ²)
    roy_vetterli     exp H(σ/Σσ), on σ itself, not squared
    energy_90, _99   how many directions hold 90 % and 99 % of Σσ²

    Always stable ≤ participation ≤ entropy ≤ Roy–Vetterli ≤ rank; all are 0 for ΔW = 0.
    """

    path: str
    target: str
    layer: int | None
    rank: int
    shape: tuple[int, int]
    singular_values: tuple[float, ...]
    norm: float
    stable_rank: float
    participation: float
    entropy_rank: float
    roy_vetterli: float
    energy_90: int
    energy_99: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "shape": list(self.shape), "singular_values": list(self.singular_values)}


def spectra(adapter: Adapter | Stored) -> dict[str, Spectrum]:
    """{key: Spectrum} of all adapted matrices, in the adapter's order; from an attached adapter or a stored one.

    DoRA's ΔW has full rank and takes W0 to know: UserError for a stored adapter, the spectrum of W' − W0 for an
    attached one.
    """
    items = _items(adapter)
    sigmas = batched_singular_values({k: (B, A, s) for k, (_, _, B, A, s) in items.items()})
    return {
        k: _spectrum(k, t, layer, B.shape[1], (B.shape[0], A.shape[1]), sigmas[k])
        for k, (t, layer, B, A, _) in items.items()
    }


def _items(adapter: Adapter | Stored) -> dict[str, tuple[str, int | None, np.ndarray, np.ndarray, float]]:
    from lora_core.files import Stored

    if isinstance(adapter, Stored):
        if adapter.dora:
            raise UserError(f"the adapter in {adapter.folder} is DoRA's, whose ΔW has full rank and takes W0 to know:"
                            " give its base model (spectra --base MODEL)")  # fmt: skip
        return {k: (s.target, s.layer, s.B, s.A, s.scaling) for k, s in adapter.sites.items()}
    out = {}
    for k, site in adapter.sites.items():
        f = adapter.factors(k)
        if f.m is None:
            B, A, s = *f.factored(), f.scaling
        else:
            d = adapter.delta(k)
            B, A, s = d.B.detach(), d.A.detach(), d.scaling
        out[k] = (site.target, site.layer, B.cpu().double().numpy(), A.cpu().double().numpy(), s)
    return out


def batched_singular_values(factors: Mapping[str, tuple[np.ndarray, np.ndarray, float]]) -> dict[str, np.ndarray]:
    """{key: σ} for {key: (B (out, r), A (r, in), s)}; float64, relative to the largest σ exact to about 1e-15·√out."""
    groups: dict[tuple[int, int, int], list[str]] = {}
    for k, (B, A, _) in factors.items():
        groups.setdefault((B.shape[0], A.shape[1], B.shape[1]), []).append(k)
    out: dict[str, np.ndarray] = {}
    for keys in groups.values():
        B = np.stack([factors[k][0] for k in keys]).astype(np.float64, copy=False)
        A = np.stack([factors[k][1] for k in keys]).astype(np.float64, copy=False)
        s = np.array([factors[k][2] for k in keys])
        rb, ra = _triangle(B), _triangle(A.transpose(0, 2, 1))
        core = s[:, None, None] * (rb @ ra.transpose(0, 2, 1))
        sigma = np.linalg.svd(core, compute_uv=False)
        out |= dict(zip(keys, sigma, strict=True))
    return {k: out[k] for k in factors}


def _triangle(X: np.ndarray) -> np.ndarray:
    """R (n, k, r) of the thin QR of each X (n, m, r), up to signs.

    By Cholesky of XᵀX, twice: one pass loses accuracy like the square of X's condition, the second gains it back as
    long as that is below about 1e7 (Yamamoto et al. 2015), and both are products of matrices, some 30 times faster
    than a Householder QR of these shapes. Worse conditioned matrices take the QR.
    """
    scale = np.abs(X).max(axis=(1, 2), keepdims=True)
    try:
        with np.errstate(invalid="raise", divide="raise"):
            Y = X / scale
        L = np.linalg.cholesky(Y.transpose(0, 2, 1) @ Y)
        inverse = np.linalg.inv(L)
        if (np.linalg.norm(L, axis=(1, 2)) * np.linalg.norm(inverse, axis=(1, 2))).max() > 1e6:
            return _qr(X)
        Q = Y @ inverse.transpose(0, 2, 1)
        return scale * (L @ np.linalg.cholesky(Q.transpose(0, 2, 1) @ Q)).transpose(0, 2, 1)
    except (np.linalg.LinAlgError, FloatingPointError):  # a zero or rank-deficient matrix, or more columns than rows
        return _qr(X)


def _qr(X: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.qr(X, mode="r"))


def _spectrum(path: str, target: str, layer: int | None, rank: int, shape: tuple[int, int], s: np.ndarray) -> Spectrum:
    top = float(s[0]) if len(s) else 0.0
    if top == 0:
        return Spectrum(
            path=path,
            target=target,
            layer=layer,
            rank=rank,
            shape=shape,
            singular_values=tuple(s.tolist()),
            norm=0.0,
            stable_rank=0.0,
            participation=0.0,
            entropy_rank=0.0,
            roy_vetterli=0.0,
            energy_90=0,
            energy_99=0,
        )
    t = s / top  # so that squares of tiny and huge values neither vanish nor overflow
    e = t * t
    share = np.cumsum(e) / e.sum()
    return Spectrum(
        path=path,
        target=target,
        layer=layer,
        rank=rank,
        shape=shape,
        singular_values=tuple(s.tolist()),
        norm=top * float(np.sqrt(e.sum())),
        stable_rank=float(e.sum()),
        participation=float(e.sum() ** 2 / (e * e).sum()),
        entropy_rank=_exp_entropy(e / e.sum()),
        roy_vetterli=_exp_entropy(t / t.sum()),
        energy_90=energy_rank(share, 0.90),
        energy_99=energy_rank(share, 0.99),
    )


def _exp_entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def energy_rank(share: np.ndarray, tau: float) -> int:
    """The least k whose share (cumulative Σσ² over the total) reaches tau, forgiving the last rounding."""
    return int(np.searchsorted(share, tau * (1 - 1e-12)) + 1) if tau < 1 else len(share)


def energy(singular_values: np.ndarray | tuple[float, ...]) -> np.ndarray:
    """Cumulative share of Σσ² held by the first 1, 2, … directions; zeros for ΔW = 0."""
    s = np.asarray(singular_values, float)
    top = s.max(initial=0.0)
    if top == 0:
        return np.zeros_like(s)
    e = np.cumsum((s / top) ** 2)
    return e / e[-1]


def same_norm_random(out: int, in_: int, rank: int, norm: float, seed: int = 0) -> np.ndarray:
    """σ (rank,) of a product of Gaussian B (out, rank) and A (rank, in), scaled to the Frobenius norm `norm`.

    The null against which a learnt spectrum is read: how evenly an update of the same rank and size spreads when
    nothing was learnt.
    """
    g = np.random.default_rng(seed)
    B, A = g.standard_normal((out, rank)), g.standard_normal((rank, in_))
    s = batched_singular_values({"": (B, A, 1.0)})[""]
    total = np.sqrt((s * s).sum())
    return s * (norm / total)
