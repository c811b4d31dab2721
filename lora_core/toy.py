"""LoRA on one matrix of 16 × 24, from scratch in numpy: what the Play tab draws, step by step.

    from lora_core.toy import Toy, train
    film = train(Toy(r=2), steps=150)
    film.loss[-1], film.sigma(-1)

The layer computes `h = W0 x + s·B A x` and should become `(W0 + target) x`. With X = sBA and inputs of covariance C the
gradient by X is `G = (X − target) C`, so `∂A = s Bᵀ G` and `∂B = s G Aᵀ`. A full fine-tuning of the same matrix runs
beside it. `app/static/toy.js` computes the same from the same random numbers; a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

D, K, SAMPLES = 16, 24, 64
Array = np.ndarray


@dataclass(frozen=True)
class Toy:
    """The dials. rule: s is α/r ("r"), α/√r ("root") or α ("one"); init: which of A, B start random."""

    r: int = 4
    alpha: float = 4.0
    rule: str = "r"
    init: str = "A"  # A | B | both | none
    std: float = 0.02
    opt: str = "sgd"  # sgd | adam
    rate: float = 0.05
    rstar: int = 3
    spectrum: str = "halving"  # halving | flat | linear
    top: float = 4.0  # the largest singular value of the target
    inputs: str = "plain"  # plain | stretched (condition 100) | samples (64 of them, with noise)
    noise: float = 0.5
    seed: int = 2
    eps: float = 1e-8  # of Adam

    @property
    def s(self) -> float:
        return self.alpha / {"r": self.r, "root": np.sqrt(self.r), "one": 1.0}[self.rule]


def normals(seed: int, stream: int, rows: int, columns: int) -> Array:
    """Standard normal numbers: the generator mulberry32, whose state is a counter, and Box and Muller's cosine."""
    u = np.uint32
    start = (seed * 0x9E3779B1 + stream * 0x85EBCA77) & 0xFFFFFFFF
    with np.errstate(over="ignore"):
        a = (np.arange(1, 2 * rows * columns + 1, dtype=u) * u(0x6D2B79F5) + u(start)).astype(u)
        t = (a ^ (a >> u(15))) * (a | u(1))
        t = (t + (t ^ (t >> u(7))) * (t | u(61))) ^ t
    x = ((t ^ (t >> u(14))) + 0.5) / 4294967296.0
    return (np.sqrt(-2 * np.log(x[::2])) * np.cos(2 * np.pi * x[1::2])).reshape(rows, columns)


def orthonormal(rows: Array) -> Array:
    """Its rows made orthonormal (Gram and Schmidt, twice for the last digits)."""
    q = rows.copy()
    for i in range(len(q)):
        for _ in range(2):
            for j in range(i):
                q[i] -= (q[i] @ q[j]) * q[j]
        q[i] /= np.sqrt(q[i] @ q[i])
    return q


@dataclass(frozen=True)
class Problem:
    """What is to be learnt: W0, the target of rank r* = Σ σ u vᵀ, and the inputs it is learnt from."""

    W0: Array
    U: Array  # r* rows
    V: Array
    sigma: Array
    target: Array
    C: Array  # covariance of the inputs
    R: Array  # what the noise of the samples adds to −G
    rest: float  # the noise that no matrix explains

    def error(self, X: Array) -> float:
        """Squared error on the inputs that are trained on."""
        E = X - self.target
        return float(np.sum((E @ self.C) * E) - 2 * np.sum(E * self.R) + self.rest)


def problem(toy: Toy) -> Problem:
    i = np.arange(toy.rstar)
    sigma = toy.top * {"halving": 0.5**i, "flat": i * 0 + 1.0, "linear": 1 - i / toy.rstar}[toy.spectrum]
    U, V = (orthonormal(normals(toy.seed, n, toy.rstar, m)) for n, m in ((2, D), (3, K)))
    C, R, rest = np.eye(K), np.zeros((D, K)), 0.0
    if toy.inputs == "stretched":
        Q, e = orthonormal(normals(toy.seed, 6, K, K)), 100.0 ** (-np.arange(K) / (K - 1))
        C = (Q.T * (e * K / e.sum())) @ Q
    elif toy.inputs == "samples":
        x, E = normals(toy.seed, 6, K, SAMPLES), toy.noise * normals(toy.seed, 7, D, SAMPLES)
        C, R, rest = x @ x.T / SAMPLES, E @ x.T / SAMPLES, float(np.sum(E * E)) / SAMPLES
    return Problem(normals(toy.seed, 1, D, K) / np.sqrt(K), U, V, sigma, (U.T * sigma) @ V, C, R, rest)


@dataclass
class Film:
    """Every step of a training, the start included; `loss` and `full` begin at 1: nothing learnt yet."""

    toy: Toy
    problem: Problem
    A: list[Array] = field(default_factory=list)
    B: list[Array] = field(default_factory=list)
    F: list[Array] = field(default_factory=list)  # full fine-tuning
    loss: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)  # on new inputs, which are plain and without noise
    full: list[float] = field(default_factory=list)
    full_held: list[float] = field(default_factory=list)

    def X(self, t: int) -> Array:
        return self.toy.s * (self.B[t] @ self.A[t])

    def sigma(self, t: int) -> Array:
        return np.linalg.svd(self.X(t), compute_uv=False)

    def shares(self, t: int) -> Array:
        """How much of each direction of the target is there: uᵀXv / σ."""
        p = self.problem
        return np.einsum("id,dk,ik->i", p.U, self.X(t), p.V) / p.sigma


def train(toy: Toy, steps: int) -> Film:
    p, s = problem(toy), toy.s
    A = toy.std * normals(toy.seed, 4, toy.r, K) * (toy.init in ("A", "both"))
    B = toy.std * normals(toy.seed, 5, toy.r, D).T * (toy.init in ("B", "both"))
    F = np.zeros((D, K))
    moments = [(np.zeros_like(w), np.zeros_like(w)) for w in (A, B, F)]
    zero, plain, p1, p2 = p.error(np.zeros((D, K))), float(np.sum(p.target**2)), 1.0, 1.0
    film = Film(toy, p)
    for t in range(steps + 1):
        X = s * (B @ A)
        for name, w in (("A", A), ("B", B), ("F", F)):
            getattr(film, name).append(w.copy())
        film.loss.append(p.error(X) / zero)
        film.full.append(p.error(F) / zero)
        film.held.append(float(np.sum((X - p.target) ** 2)) / plain)
        film.full_held.append(float(np.sum((F - p.target) ** 2)) / plain)
        if t == steps or not film.loss[-1] < 1e4:  # diverged
            break
        G, p1, p2 = (X - p.target) @ p.C - p.R, p1 * 0.9, p2 * 0.999
        for w, (m, v), g in zip((A, B, F), moments, (s * (B.T @ G), s * (G @ A.T), (F - p.target) @ p.C - p.R)):
            if toy.opt == "adam":
                m[:], v[:] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * (g * g)
                below = np.sqrt(v / (1 - p2)) + toy.eps
                g = np.where(below > 0, (m / (1 - p1)) / np.where(below > 0, below, 1), 0)
            w -= toy.rate * g
    return film


def bf16(x: Array) -> Array:
    """Rounded to bfloat16: the upper half of a float32, to nearest, ties to even."""
    n = x.astype(np.float32).view(np.uint32)
    return ((n + (((n >> 16) & 1) + np.uint32(0x7FFF))) & np.uint32(0xFFFF0000)).view(np.float32).astype(float)


def swaps(toy: Toy, count: int, *, dtype: str = "bf16", fresh: bool = True) -> list[Array]:
    """W after each of `count` times of adding an adapter's update to W0 and taking it away again."""
    rounded = bf16 if dtype == "bf16" else lambda x: x.astype(np.float32).astype(float)
    p = problem(toy)
    W = rounded(p.W0)
    out = [W]
    for i in range(count):
        n = i if fresh else i % 2
        U, V = (orthonormal(normals(toy.seed, 100 + 2 * n + j, toy.rstar, m)) for j, m in ((0, D), (1, K)))
        delta = rounded((U.T * p.sigma) @ V)
        out.append(W := rounded(rounded(W + delta) - delta))
    return out
