"""How well two stored adapters would merge: how much their updates point the same way, matrix by matrix. Numpy alone.

Added up, W0 + ΔW₁ + ΔW₂ does to an input what each does alone as far as the two read from different directions. What
the files say of that: the cosine of the two updates, and the principal angles between the inputs that they read and
between the outputs that they write. It is no loss: the sum's has to be measured.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lora_core.cut_open import svd_of
from lora_core.errors import UserError
from lora_core.stored import Stored, StoredSite

ENERGY = 0.9  # of each update: its first directions that hold so much are compared


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One matrix that both adapters change.

    norms    ‖ΔW₁‖_F, ‖ΔW₂‖_F
    cosine   ⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖·‖ΔW₂‖): 1 when one repeats the other, −1 when it undoes it, 0 when they are unrelated
    i, j     how many directions hold 90 % of each
    reads, writes   φ of section 7.2 between the inputs and between the outputs of those: the mean cos² of their
             principal angles; chance_reads, chance_writes: what random directions have, max(i, j) over the dimension
    angle    the smallest principal angle between the inputs that they read, in degrees
    """

    key: str
    target: str
    layer: int | None
    norms: tuple[float, float]
    cosine: float
    i: int
    j: int
    reads: float
    writes: float
    chance_reads: float
    chance_writes: float
    angle: float


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How two adapters fit together.

    pairs    the matrices that both change; alone: how many only one of them does
    norms    ‖ΔW‖ of each over all its matrices; cosine: of the two over all matrices
    reads, chance  mean over the pairs of `Pair.reads` and of what random directions have
    """

    pairs: tuple[Pair, ...]
    alone: tuple[int, int]
    norms: tuple[float, float]
    cosine: float
    reads: float
    chance: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def merge_fit(one: Stored, other: Stored) -> Fit:
    """Compare two stored adapters of the same model. Raises UserError where a matrix has another shape in each."""
    pairs, inner = [], 0.0
    for key, a in one.sites.items():
        b = other.sites.get(key)
        if b is None:
            continue
        if (a.B.shape[0], a.A.shape[1]) != (b.B.shape[0], b.A.shape[1]):
            this, that = (f"{s.B.shape[0]}×{s.A.shape[1]}" for s in (a, b))
            raise UserError(f"{key} is {this} in one adapter and {that} in the other: they are of different models")
        pair, product = _pair(key, a, b)
        pairs.append(pair)
        inner += product
    norms = _norm(one), _norm(other)
    size = norms[0] * norms[1]
    return Fit(pairs=tuple(pairs), alone=(len(one.sites) - len(pairs), len(other.sites) - len(pairs)), norms=norms,
               cosine=inner / size if size else 0.0, reads=float(np.mean([p.reads for p in pairs])) if pairs else 0.0,
               chance=float(np.mean([p.chance_reads for p in pairs])) if pairs else 0.0)  # fmt: skip


def _pair(key: str, a: StoredSite, b: StoredSite) -> tuple[Pair, float]:
    (U1, s1, V1), (U2, s2, V2) = _bases(a), _bases(b)
    inner = float(((U1 * s1).T @ (U2 * s2) * (V1 @ V2.T)).sum())
    n1, n2 = float(np.linalg.norm(s1)), float(np.linalg.norm(s2))
    i, j = _enough(s1), _enough(s2)
    least, reads, writes = 90.0, 0.0, 0.0
    if i and j:
        cosines = np.clip(np.linalg.svd(V1[:i] @ V2[:j].T, compute_uv=False), 0, 1)
        least = float(np.degrees(np.arccos(cosines.max())))
        reads = float(np.square(cosines).mean())
        writes = float(np.square(np.linalg.svd(U1[:, :i].T @ U2[:, :j], compute_uv=False)).mean())
    out, in_ = a.B.shape[0], a.A.shape[1]
    return Pair(key=key, target=a.target, layer=a.layer, norms=(n1, n2), cosine=inner / (n1 * n2) if n1 * n2 else 0.0,
                i=i, j=j, reads=reads, writes=min(1.0, writes), chance_reads=min(1.0, max(i, j) / in_),
                chance_writes=min(1.0, max(i, j) / out), angle=least), inner  # fmt: skip


def _bases(s: StoredSite) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U (out, n), σ (n,), Vᵀ (n, in) of s·B·A, without the directions that are rounding."""
    B, sigma, A = svd_of(s)
    live = sigma > 1e-12 * (sigma[0] if len(sigma) else 0.0)
    root = np.sqrt(sigma[live])
    return B[:, live] / root, sigma[live], A[live] / root[:, None]


def _enough(sigma: np.ndarray) -> int:
    e = np.cumsum(np.square(sigma))
    return int(np.searchsorted(e, ENERGY * e[-1] * (1 - 1e-12)) + 1) if len(e) else 0


def _norm(stored: Stored) -> float:
    return float(np.sqrt(sum(np.square(svd_of(s)[1]).sum() for s in stored.sites.values())))
