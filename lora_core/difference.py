"""ΔW that is no product of thin factors, matrix by matrix: a fully fine-tuned checkpoint's difference to its base, and
what DoRA makes of W0. Numpy alone, one matrix in memory.

Such a ΔW has full rank, so that its control is not the product of two thin Gaussian factors but one Gaussian matrix of
the same norm, whose singular values follow the law of Marchenko and Pastur.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from lora_core.base_files import BaseFiles
from lora_core.errors import UserError
from lora_core.families import guess
from lora_core.spectra import Spectrum, spectrum_of
from lora_core.stored import Stored
from lora_core.weights import Weights

MOST = 1 << 28  # numbers of one matrix: 1 GiB in float32
TINY = float(np.finfo(np.float32).tiny)  # the least length that a row is divided by, as in training
SIDE = 16_384  # the smaller side of a matrix: beyond it one takes hours


class Whole(ABC):
    """ΔW of some matrices, each of full rank."""

    @abstractmethod
    def keys(self) -> Sequence[str]: ...

    @abstractmethod
    def delta(self, key: str) -> np.ndarray:
        """ΔW (out, in) of one of them, in float64."""

    @abstractmethod
    def place(self, key: str) -> tuple[str, int | None]:
        """(logical name, layer)"""

    def __len__(self) -> int:
        return len(self.keys())

    def spectrum(self, key: str) -> Spectrum:
        """The singular values of one ΔW, and what they say."""
        D = self.delta(key)
        target, layer = self.place(key)
        return spectrum_of(key, target, layer, min(D.shape), (D.shape[0], D.shape[1]), singular_values(D))

    def spectra(self) -> Iterator[tuple[str, Spectrum]]:
        """(module, its Spectrum), one after the other: each takes from milliseconds to seconds."""
        for key in self.keys():
            yield key, self.spectrum(key)


class DoraDifference(Whole):
    """W' − W0 of every matrix of a stored DoRA adapter: m·(W0 + s·B·A)/‖W0 + s·B·A‖ − W0, row by row.

    It turns the rows of W0 and stretches them, so that its rank is W0's, not r (Liu et al. 2024, eq. 5).
    """

    def __init__(self, stored: Stored, base: BaseFiles) -> None:
        self.sites, self.base = stored.sites, base
        for key, s in self.sites.items():
            _bounded(key, (len(s.B), s.A.shape[1]))

    def keys(self) -> Sequence[str]:
        return list(self.sites)

    def delta(self, key: str) -> np.ndarray:
        """W' − W0 (out, in) as the module multiplies, in float64. UserError where the base has no such matrix."""
        site = self.sites[key]
        W0 = self.base.W0(site).astype(np.float64)
        D = site.scaling * (site.B.astype(np.float64) @ site.A)
        if site.m is None:
            return D
        W = W0 + D
        return site.m[:, None] / np.maximum(np.linalg.norm(W, axis=1, keepdims=True), TINY) * W - W0

    def place(self, key: str) -> tuple[str, int | None]:
        return self.sites[key].target, self.sites[key].layer


class Difference(Whole):
    """W − W0 of every matrix that both have. `base`: another model's files with the same names and shapes."""

    def __init__(self, path: Path, tuned: Weights, base: Weights) -> None:
        self.path, self.tuned, self.base = path, tuned, base
        self.pairs: dict[str, tuple[str, str]] = {}  # module: (name there, name here)
        self.left: list[str] = []  # tensors that are no matrix, or that the base has not
        names = same_names(tuned, base)
        for name in tuned:
            here = names.get(name)
            shape = tuned.shape(name)
            if here is None or base.shape(here) != shape or len(shape) != 2:
                self.left.append(name)
                continue
            _bounded(f"{path}: {name}", (shape[0], shape[1]))
            self.pairs[name.removesuffix(".weight")] = (name, here)
        if not self.pairs:
            raise UserError(f"{path} and {base.path} have no matrix of one name and shape: the base is another model's")

    def keys(self) -> Sequence[str]:
        return list(self.pairs)

    def delta(self, key: str) -> np.ndarray:
        """W − W0 (out, in) as it is stored, in float64."""
        there, here = self.pairs[key]
        return self.tuned.read(there).astype(np.float64) - self.base.read(here)

    def place(self, key: str) -> tuple[str, int | None]:
        """(logical name, layer)"""
        return guess(key)


def _bounded(name: str, shape: tuple[int, int]) -> None:
    if shape[0] * shape[1] > MOST or min(shape) > SIDE:
        raise UserError(f"{name} is {shape[0]:,}×{shape[1]:,}, which is too large to be decomposed")


def same_names(tuned: Weights, base: Weights) -> dict[str, str]:
    """{tensor: the base's tensor of that name}; models are stored with and without the name of their body in front."""
    short = {n.partition(".")[2]: n for n in base}
    out = {}
    for name in tuned:
        rest = name.partition(".")[2]
        found = name if name in base else rest if rest in base else short.get(name)
        if found:
            out[name] = found
    return out


def singular_values(D: np.ndarray) -> np.ndarray:
    """σ (n,) of a dense matrix in float64; of a very long one through its Gram matrix, exact to 1e-8 of the largest."""
    if not D.any():
        return np.zeros(min(D.shape))
    if max(D.shape) < 4 * min(D.shape):
        return np.linalg.svd(D, compute_uv=False)
    M = D if D.shape[0] < D.shape[1] else D.T
    return np.sqrt(np.maximum(np.linalg.eigvalsh(M @ M.T)[::-1], 0.0))


# ---- the null of full fine-tuning ----------------------------------------------------------------------------------
@lru_cache(maxsize=64)
def noise_quantiles(out: int, in_: int) -> np.ndarray:
    """σ (n,), largest first, of a Gaussian (out, in) matrix with Σσ² = 1: quantiles of the Marchenko–Pastur law."""
    n, m = sorted((out, in_))
    c = n / m
    low, high = (1 - np.sqrt(c)) ** 2, (1 + np.sqrt(c)) ** 2
    # x = middle − half·cos t makes the density's root singularities at both ends smooth
    t = np.linspace(0, np.pi, 20_001)
    x = (low + high) / 2 - (high - low) / 2 * np.cos(t)
    with np.errstate(divide="ignore", invalid="ignore"):
        density = np.where(x > 1e-15, ((high - low) / 2 * np.sin(t)) ** 2 / (2 * np.pi * c * x), 0.0)
    if low < 1e-12:  # square: the limit at 0 is finite in t
        density[0] = (high - low) / 2 * 2 / (2 * np.pi * c)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(t))])
    sigma = np.sqrt(np.maximum(np.interp((np.arange(n) + 0.5) / n, mass / mass[-1], x), 0.0))[::-1]
    return sigma / np.sqrt(np.square(sigma).sum())


def same_norm_noise(out: int, in_: int, norm: float) -> np.ndarray:
    """σ of one Gaussian matrix (out, in) of Frobenius norm `norm`: a dense update in which nothing was learnt."""
    return noise_quantiles(out, in_) * norm


def noise_edge_full(sigma: np.ndarray, out: int, in_: int) -> float:
    """The largest σ that Gaussian noise with this median reaches: the upper edge of the Marchenko–Pastur law."""
    q = noise_quantiles(out, in_)
    n, m = sorted((out, in_))
    top = (1 + np.sqrt(n / m)) / np.sqrt(n)  # in units of ‖·‖_F
    return float(np.median(sigma) * top / np.median(q))


def find_base(tuned: Weights, here: Mapping[str, Path]) -> str | None:
    """The name of the model that has most of a checkpoint's matrices, by names and shapes; None where none has half."""
    best, most = None, 0.0
    wanted = [n for n in tuned if len(tuned.shape(n)) == 2]
    for name, folder in here.items():
        try:
            base = Weights(folder)
        except UserError:
            continue
        names = same_names(tuned, base)
        hits = sum(n in names and base.shape(names[n]) == tuned.shape(n) for n in wanted)
        if wanted and hits / len(wanted) > max(most, 0.5 - 1e-9):
            best, most = name, hits / len(wanted)
    return best
