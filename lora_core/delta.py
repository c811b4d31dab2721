"""Delta: an update ΔW = s·B·A kept as its factors. The heart of every analysis.

ΔW (out, in) of rank r has r·(out + in) numbers instead of out·in, and everything one asks of it can be had from the
factors: with thin QR factorisations B = Q_B·R_B and Aᵀ = Q_A·R_A, ΔW = Q_B·(s·R_B·R_Aᵀ)·Q_Aᵀ, so its singular values
are those of an r×r matrix. All of it is defined on ΔW, not on the factors: (B·R⁻¹, R·A) is the same Delta.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Delta:
    """ΔW = scaling·B·A with B (out, r) and A (r, in)."""

    B: Tensor
    A: Tensor
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(
                f"B (out, r) and A (r, in) must share r; given {tuple(self.B.shape)} and {tuple(self.A.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """r, the number of columns of B: an upper bound of the rank of ΔW."""
        return self.B.shape[1]

    def __repr__(self) -> str:
        return f"Delta({self.shape[0]}×{self.shape[1]}, rank ≤ {self.rank}, ‖ΔW‖ {float(self.norm()):.3g})"

    # ---- views of the matrix
    def dense(self) -> Tensor:
        """ΔW as a matrix (out, in), in the factors' dtype."""
        return self.scaling * (self.B @ self.A)

    @property
    def T(self) -> Delta:
        """ΔWᵀ (in, out)."""
        return Delta(self.A.T, self.B.T, self.scaling)

    def __matmul__(self, x: Tensor) -> Tensor:
        """ΔW @ x for x (in, n), without forming ΔW."""
        return self.scaling * (self.B @ (self.A @ x))

    def to(self, *args: object, **kwargs: object) -> Delta:
        """The same Delta with its factors on another device or in another dtype, as `Tensor.to`."""
        return Delta(self.B.to(*args, **kwargs), self.A.to(*args, **kwargs), self.scaling)  # type: ignore[call-overload]

    def double(self) -> Delta:
        """In float64, exact for float32 factors."""
        return self.to(torch.float64)

    # ---- spectrum
    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (out, n), S (n,), Vh (n, in) with ΔW = U·diag(S)·Vh and n = min(r, out, in).

        Computed in float64 through the factors' QR, at O((out + in)·r²), and given back in the factors' dtype.
        """
        qb, rb = torch.linalg.qr(self.B.double())
        qa, ra = torch.linalg.qr(self.A.double().T)
        u, s, vh = torch.linalg.svd(self.scaling * (rb @ ra.T), full_matrices=False)
        dtype = self.B.dtype
        return (qb @ u).to(dtype), s.to(dtype), (vh @ qa.T).to(dtype)

    def singular_values(self) -> Tensor:
        """σ (n,), largest first, n = min(r, out, in)."""
        rb = torch.linalg.qr(self.B.double(), mode="r")[1]
        ra = torch.linalg.qr(self.A.double().T, mode="r")[1]
        return torch.linalg.svdvals(self.scaling * (rb @ ra.T)).to(self.B.dtype)

    def norm(self) -> Tensor:
        """‖ΔW‖_F, a scalar tensor: the root of the sum of the squared singular values."""
        return self.singular_values().double().square().sum().sqrt().to(self.B.dtype)

    def truncate(self, k: int) -> Delta:
        """The best approximation of rank k in the Frobenius and spectral norms (Eckart–Young); k = 0 is no update.

        Its factors are balanced (‖B's columns‖ = ‖A's rows‖ = √σ) and its scaling is 1.
        """
        if k < 0:
            raise ValueError(f"cannot keep {k} directions; k is 0 or more")
        d = self.double()
        U, S, Vh = d.svd()
        root = S[:k].sqrt()
        return Delta((U[:, :k] * root).to(self.B.dtype), (root[:, None] * Vh[:k]).to(self.A.dtype))

    def balanced(self) -> Delta:
        """The same ΔW from factors of equal weight: BᵀB = A·Aᵀ = diag(σ), scaling 1; rank at most min(r, out, in)."""
        return self.truncate(min(self.rank, *self.shape))

    # ---- algebra, defined on ΔW
    def __add__(self, other: Delta) -> Delta:
        """ΔW + ΔW': the factors side by side; rank at most the sum of both."""
        if not isinstance(other, Delta):
            return NotImplemented
        if self.shape != other.shape:
            raise ValueError(f"cannot add updates of {self.shape} and {other.shape}")
        B = torch.cat([self.scaling * self.B, other.scaling * other.B], dim=1)
        return Delta(B, torch.cat([self.A, other.A], dim=0))

    def __neg__(self) -> Delta:
        return Delta(self.B, self.A, -self.scaling)

    def __sub__(self, other: Delta) -> Delta:
        return self + (-other) if isinstance(other, Delta) else NotImplemented

    def __mul__(self, factor: float) -> Delta:
        return Delta(self.B, self.A, self.scaling * float(factor))

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> Delta:
        return Delta(self.B, self.A, self.scaling / float(factor))
