"""How much of each rank an adapter uses, from the spectra alone; no model, no torch.

Looked at is s·B·A, which is what a cut acts on. With DoRA that is not all of ΔW, but all of it that has a rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_core.difference import noise_edge_full
from lora_core.errors import UserError
from lora_core.frames import frame
from lora_core.spectra import Spectrum, batched_singular_values, energy, energy_rank, spectrum_of

if TYPE_CHECKING:
    import pandas

    from lora_core.adapter import Adapter
    from lora_core.files import Stored

ENOUGH = 0.95  # of Σσ² over all matrices: the rank that keeps it is suggested
DEAD = 0.01  # of the root mean square norm of the adapter's matrices
FULL = 0.75  # of the rank
LEVEL = 0.95  # of pure noise has no singular value above the edge
RULES = {
    "dead": f"‖ΔW‖ is below {DEAD:.0%} of the adapter's root mean square norm",
    "collapsed": "one direction of several holds 99 % of Σσ²",
    "partly used": f"99 % of Σσ² takes at most {FULL:.0%} of the rank",
    "full": f"99 % of Σσ² takes more than {FULL:.0%} of the rank",
}


@dataclass(frozen=True, kw_only=True)
class MatrixAudit:
    """What one s·B·A (out, in) makes of its rank.

    stable_rank       Σσ²/σ₁²; utilization is that over the rank
    energy_rank_…     how many directions hold 90, 95 and 99 % of Σσ²; used is the last one over the rank
    mp_edge, mp_rank  the largest σ that noise of this shape reaches, and how many are above it (see `noise_edge`);
                      with one direction there is nothing to tell apart: None, and 1 unless ΔW = 0
    word              dead, collapsed, partly used or full; the rules are `lora_core.audit.RULES`
    """

    path: str
    target: str
    layer: int | None
    rank: int
    shape: tuple[int, int]
    norm: float
    stable_rank: float
    utilization: float
    energy_rank_90: int
    energy_rank_95: int
    energy_rank_99: int
    used: float
    mp_edge: float | None
    mp_rank: int
    word: str
    singular_values: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "shape": list(self.shape), "singular_values": list(self.singular_values)}


@dataclass(frozen=True, kw_only=True)
class Audit:
    """All matrices of an adapter, and the rank that would have been enough by their spectra.

    suggested_rank  the least k for which the best cut of every matrix to rank k keeps 95 % of Σσ² over all matrices
    kept_energy     what such cuts keep, for k = 0, 1, … up to the largest rank
    """

    matrices: tuple[MatrixAudit, ...]
    suggested_rank: int
    kept_energy: tuple[float, ...]

    def to_frame(self) -> pandas.DataFrame:
        """A row for each matrix, as a pandas DataFrame."""
        return frame([m.to_dict() for m in self.matrices])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"matrices": [m.to_dict() for m in self.matrices], "suggested_rank": self.suggested_rank,
                "kept_energy": list(self.kept_energy)}  # fmt: skip


def audit(adapter: Adapter | Stored) -> Audit:
    """How much of each rank is used, of an attached adapter or a stored one. UserError where there are no factors."""
    from lora_core.files import Stored

    if isinstance(adapter, Stored):
        items = {k: (s.target, s.layer, s.B, s.A, s.scaling) for k, s in adapter.sites.items()}
    else:
        items = {}
        for k, site in adapter.sites.items():
            f = adapter.factors(k)
            B, A = (p.cpu().double().numpy() for p in f.factored())
            items[k] = (site.target, site.layer, B, A, f.scaling)
    if not items:
        raise UserError("this adapter has no low-rank updates: all that it changes is trained itself")
    sigmas = batched_singular_values({k: (B, A, s) for k, (_, _, B, A, s) in items.items()})
    return audit_spectra({k: spectrum_of(k, t, layer, B.shape[1], (B.shape[0], A.shape[1]), sigmas[k])
                          for k, (t, layer, B, A, _) in items.items()})  # fmt: skip


def audit_spectra(found: Mapping[str, Spectrum], *, dense: bool = False) -> Audit:
    """The same of spectra that are known. dense: of differences of whole matrices, whose noise is one Gaussian matrix
    rather than a product of two thin ones."""
    if not found:
        raise UserError("there is no update to look at")
    sigmas = {k: np.asarray(s.singular_values) for k, s in found.items()}
    size = float(np.sqrt(np.mean([s.norm**2 for s in found.values()])))
    matrices = tuple(_of_matrix(s, sigmas[k], size, dense) for k, s in found.items())
    kept = kept_by_rank(sigmas)
    return Audit(matrices=matrices, suggested_rank=int(np.searchsorted(kept, ENOUGH * (1 - 1e-12))) if kept[-1] else 0,
                 kept_energy=tuple(kept.tolist()))  # fmt: skip


def kept_by_rank(sigmas: Mapping[str, np.ndarray]) -> np.ndarray:
    """Share of Σσ² over all matrices that the best cuts to rank 0, 1, … keep; zeros where ΔW = 0."""
    longest = max(map(len, sigmas.values()))
    total = np.zeros(longest)
    top = max((float(s[0]) for s in sigmas.values() if len(s)), default=0.0) or 1.0
    for s in sigmas.values():
        total[: len(s)] += np.square(s / top)
    kept = np.concatenate([[0.0], np.cumsum(total)])
    return kept / (kept[-1] or 1.0)


def _of_matrix(s: Spectrum, sigma: np.ndarray, size: float, dense: bool) -> MatrixAudit:
    rank = s.rank
    edge = noise_edge_full(sigma, *s.shape) if dense else noise_edge(sigma, *s.shape, rank)
    used = s.energy_99 / rank
    word = ("dead" if s.norm <= DEAD * size else "collapsed" if rank > 1 and s.energy_99 == 1
            else "partly used" if used <= FULL else "full")  # fmt: skip
    return MatrixAudit(
        path=s.path,
        target=s.target,
        layer=s.layer,
        rank=rank,
        shape=s.shape,
        norm=s.norm,
        stable_rank=s.stable_rank,
        utilization=s.stable_rank / rank,
        energy_rank_90=s.energy_90,
        energy_rank_95=energy_rank(energy(sigma), 0.95) if s.norm else 0,
        energy_rank_99=s.energy_99,
        used=used,
        mp_edge=edge,
        mp_rank=int((sigma > (edge or 0.0)).sum()),
        word=word,
        singular_values=s.singular_values,
    )


# ---- noise -------------------------------------------------------------------------------------------------------
def noise_edge(sigma: np.ndarray, out: int, in_: int, rank: int) -> float | None:
    """The largest σ that noise would reach in an update of this shape and rank; None if there is only one.

    Noise is B·A with independent Gaussian B (out, rank) and A (rank, in): what a spectrum looks like where no
    direction was preferred. Its size is taken from the median σ, as Gavish and Donoho do for a noise of unknown size
    (arXiv 1305.5870): half of the directions or fewer may be signal without moving it much. The edge is that median
    times the quotient σ₁/median that 95 % of such products stay below; as the rank grows, it becomes the upper edge of
    the product of two Marchenko–Pastur laws, √min over z > 0 of (1+z)(1+z·rank/out)(1+z·rank/in)/z in units of the
    root mean square. mp_rank is thus at most half of the rank where the spectrum falls slowly, and 0 where it is even:
    it says what stands out, not what is of use.
    """
    return float(np.median(sigma)) * noise_quotient(out, in_, rank) if len(sigma) > 1 else None


@lru_cache(maxsize=256)
def noise_quotient(out: int, in_: int, rank: int) -> float:
    """The quotient of the largest and the median σ that 95 % of Gaussian products of this shape stay below."""
    g = np.random.default_rng(0)
    draws = int(np.clip(5e7 / rank**3, 24, 400))
    s = np.linalg.svd(_core(g, draws, out, rank) @ _core(g, draws, in_, rank).transpose(0, 2, 1), compute_uv=False)
    return float(np.quantile(s[:, 0] / np.median(s, axis=1), LEVEL))


def _core(g: np.random.Generator, draws: int, n: int, rank: int) -> np.ndarray:
    """(draws, min(n, rank), rank) with the law of R in the QR of a Gaussian (n, rank), without drawing that.

    R has independent entries: N(0, 1) above the diagonal, and on it the roots of χ² with n, n − 1, … degrees of
    freedom (Bartlett 1933).
    """
    X = g.standard_normal((draws, min(n, rank), rank))
    if n < rank:
        return X
    i = np.arange(rank)
    X = np.triu(X, 1)
    X[:, i, i] = np.sqrt(g.chisquare(n - i, (draws, rank)))
    return X
