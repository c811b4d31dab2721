"""The singular values of every ΔW of an adapter, and what they say: norms and effective ranks.

All of it from the factors, in float64 and numpy alone: with Aᵀ = Q_A·R_A and B = Q_B·R_B the singular values of
ΔW = s·B·A are those of the r×r matrix s·R_B·R_Aᵀ. Matrices of one shape go through LAPACK as one batch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_core.errors import UserError
from lora_core.frames import frame

if TYPE_CHECKING:
    import pandas

    from lora_core.adapter import Adapter
    from lora_core.files import Stored

TOGETHER = 30  # matrices in a batch
THIN = 16  # up to this rank BLAS keeps to one core, so that batches are worth a thread each
ENOUGH = 1e4  # times λ_min over r: then one pass of Cholesky leaves an error of some 1e-12


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


class Spectra(dict[str, Spectrum]):
    """{key: Spectrum}, in the adapter's order."""

    def to_frame(self) -> pandas.DataFrame:
        """A row for each matrix, indexed by its path."""
        return frame([s.to_dict() for s in self.values()]).set_index("path", drop=True)


def spectra(adapter: Adapter | Stored) -> Spectra:
    """{key: Spectrum} of all adapted matrices, in the adapter's order; from an attached adapter or a stored one.

    DoRA's ΔW has full rank and takes W0 to know: UserError for a stored adapter, the spectrum of W' − W0 for an
    attached one.
    """
    items = _items(adapter)
    sigmas = batched_singular_values({k: (B, A, s) for k, (_, _, B, A, s) in items.items()})
    by_rank: dict[int, list[str]] = {}
    for k, sigma in sigmas.items():
        by_rank.setdefault(len(sigma), []).append(k)
    figures = {}
    for keys in by_rank.values():
        figures |= dict(zip(keys, _figures(np.stack([sigmas[k] for k in keys])), strict=True))
    return Spectra({
        k: Spectrum(path=k, target=t, layer=layer, rank=B.shape[1], shape=(B.shape[0], A.shape[1]), **figures[k])
        for k, (t, layer, B, A, _) in items.items()
    })  # fmt: skip


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
        out[k] = (site.target, site.layer, B.cpu().numpy(), A.cpu().numpy(), s)
    return out


def batched_singular_values(factors: Mapping[str, tuple[np.ndarray, np.ndarray, float]]) -> dict[str, np.ndarray]:
    """{key: σ} for {key: (B (out, r), A (r, in), s)}; float64, relative to the largest σ exact to about 1e-15·√out."""
    groups: dict[tuple[int, int, int], list[str]] = {}
    for k, (B, A, _) in factors.items():
        groups.setdefault((B.shape[0], A.shape[1], B.shape[1]), []).append(k)
    parts = [keys[i : i + TOGETHER] for keys in groups.values() for i in range(0, len(keys), TOGETHER)]

    def of(keys: list[str]) -> np.ndarray:
        B = np.stack([factors[k][0] for k in keys]).astype(np.float64, copy=False)
        A = np.stack([factors[k][1] for k in keys]).astype(np.float64, copy=False)
        s = np.array([factors[k][2] for k in keys])
        core = s[:, None, None] * (_triangle(B) @ _triangle(A.transpose(0, 2, 1)).transpose(0, 2, 1))
        return np.linalg.svd(core, compute_uv=False)

    if len(parts) < 2 or max(r for _, _, r in groups) > THIN:
        found = [of(keys) for keys in parts]
    else:  # numpy lets go of Python's lock while it computes
        with ThreadPoolExecutor(min(len(parts), os.cpu_count() or 1)) as pool:
            found = list(pool.map(of, parts))
    out = {k: sigma for keys, sigmas in zip(parts, found, strict=True) for k, sigma in zip(keys, sigmas, strict=True)}
    return {k: out[k] for k in factors}


def _triangle(X: np.ndarray) -> np.ndarray:
    """R (n, k, r) of the thin QR of each X (n, m, r), up to signs.

    By Cholesky of XᵀX with its columns scaled to length 1. That loses accuracy like the square of X's condition, which
    the determinant bounds: with trace r, λ_min ≥ det·((r−1)/r)^(r−1). Where the bound is not good enough a second pass
    gains the accuracy back (Yamamoto et al. 2015), and where that is not either, a Householder QR has it. Products of
    matrices are some 30 times faster than a QR of these shapes.
    """
    r = X.shape[2]
    with np.errstate(all="ignore"):  # what is not finite, or too small to square, takes the QR
        G = X.transpose(0, 2, 1) @ X
        d = np.sqrt(np.diagonal(G, axis1=1, axis2=2))
        if not (d.min(initial=np.inf) > 1e-140 and d.max(initial=0.0) < 1e140) or r > X.shape[1]:
            return _qr(X)
        try:
            L = np.linalg.cholesky(G / (d[:, :, None] * d[:, None, :]))
            least = np.diagonal(L, axis1=1, axis2=2).prod(1).min() ** 2 * ((r - 1) / r) ** (r - 1)
            if least * ENOUGH < r:
                inverse = np.linalg.inv(L)
                if np.linalg.norm(inverse, axis=(1, 2)).max() * np.sqrt(r) > 1e6:
                    return _qr(X)
                Q = (X / d[:, None, :]) @ inverse.transpose(0, 2, 1)
                L = L @ np.linalg.cholesky(Q.transpose(0, 2, 1) @ Q)
            return L.transpose(0, 2, 1) * d[:, None, :]
        except np.linalg.LinAlgError:
            return _qr(X)


def _qr(X: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.qr(X, mode="r"))


def spectrum_of(path: str, target: str, layer: int | None, rank: int, shape: tuple[int, int],
                s: np.ndarray) -> Spectrum:  # fmt: skip
    """The Spectrum of one ΔW (out, in) whose singular values s, largest first, are known."""
    return Spectrum(path=path, target=target, layer=layer, rank=rank, shape=shape, **_figures(s[None])[0])


def _figures(s: np.ndarray) -> list[dict[str, Any]]:
    """The figures of a Spectrum for each row of s (n, r)."""
    if s.shape[1] == 0:
        s = np.zeros((len(s), 1))
    top = s[:, :1]
    zero = top[:, 0] == 0
    t = s / np.where(top == 0, 1.0, top)  # so that squares of tiny and huge values neither vanish nor overflow
    e = t * t
    total = np.where(zero, 1.0, e.sum(1))
    share = np.cumsum(e, 1) / total[:, None]
    figures = {
        "norm": top[:, 0] * np.sqrt(total),
        "stable_rank": e.sum(1),
        "participation": e.sum(1) ** 2 / np.where(zero, 1.0, (e * e).sum(1)),
        "entropy_rank": _exp_entropy(e / total[:, None]),
        "roy_vetterli": _exp_entropy(t / np.where(zero, 1.0, t.sum(1))[:, None]),
        "energy_90": (share < 0.90 * (1 - 1e-12)).sum(1) + 1,  # as `energy_rank`
        "energy_99": (share < 0.99 * (1 - 1e-12)).sum(1) + 1,
    }
    columns = {name: np.where(zero, 0, values).tolist() for name, values in figures.items()}
    return [
        {"singular_values": tuple(row), **{n: v[i] for n, v in columns.items()}} for i, row in enumerate(s.tolist())
    ]


def _exp_entropy(p: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.exp(-np.where(p > 0, p * np.log(p), 0.0).sum(1))


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
