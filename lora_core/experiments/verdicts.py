"""From repeated measurements to a verdict, without reading more out of them than is in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lora_core.experiments.experiment import HOLDS, NOT, PARTLY, UNDECIDED, Row

# Student's t, 97.5 %, for 1, 2, … degrees of freedom: a mean of n values is known to ± t·s/√n with 95 % confidence
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def interval(values: Iterable[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % confidence interval); infinite for one value."""
    v = [float(x) for x in values]
    if not v:
        return math.nan, math.inf
    mean = math.fsum(v) / len(v)
    if len(v) == 1:
        return mean, math.inf
    sd = math.sqrt(math.fsum((x - mean) ** 2 for x in v) / (len(v) - 1))
    return mean, T[min(len(v) - 1, len(T)) - 1] * sd / math.sqrt(len(v))


def above(values: Iterable[float], bound: float = 0.0) -> bool | None:
    """Whether what the values scatter around is above the bound: True, False, or None where one cannot say."""
    mean, half = interval(values)
    return True if mean - half > bound else False if mean + half <= bound else None


def median(values: Iterable[float]) -> tuple[float, float, float]:
    """(median, and the bounds of its 95 % interval by order statistics): for times, whose outliers are large."""
    v = sorted(float(x) for x in values)
    n = len(v)
    k = int((n - 1.96 * math.sqrt(n)) / 2)
    middle = (v[(n - 1) // 2] + v[n // 2]) / 2
    return (middle, -math.inf, math.inf) if k < 1 else (middle, v[k], v[n - 1 - k])


def verdict(parts: Sequence[bool | None]) -> str:
    """The verdict of a claim of several parts: each holds, does not, or cannot be told."""
    if None in parts:  # what is certain whichever way that one would fall
        return PARTLY if True in parts and False in parts else UNDECIDED
    return HOLDS if all(parts) else PARTLY if any(parts) else NOT


def every(parts: Iterable[bool | None]) -> bool | None:
    """Whether all of them hold; None where that hangs on one that cannot be told."""
    found = list(parts)
    return False if False in found else None if None in found else True


def learnt(gains: Iterable[float]) -> bool:
    """Whether training took: the held-out loss fell clearly by more than 0.05 nats. What an adapter that learnt nothing
    looks like says nothing about adapters; the sentiment task begins with a plateau of some fifty steps."""
    return above(gains, 0.05) is True


def unlearnt(gains: Iterable[float]) -> tuple[str, str]:
    """What is said instead of a verdict about adapters that learnt nothing."""
    return UNDECIDED, f"Training did not take: the held-out loss fell by {pm(list(gains))} nats. More steps are needed."


def by(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """The rows whose values are those."""
    return [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]


def per_seed(rows: Iterable[Row], column: str, **wanted: object) -> dict[int, float]:
    """{seed: the mean of a column} over the rows that have those values."""
    found: dict[int, list[float]] = {}
    for r in by(rows, **wanted):
        found.setdefault(r["seed"], []).append(float(r[column]))
    return {s: math.fsum(v) / len(v) for s, v in found.items()}


def paired(a: dict[int, float], b: dict[int, float]) -> list[float]:
    """a − b of each seed that both have: what the seeds have in common falls out."""
    return [a[s] - b[s] for s in a if s in b]


def pm(values: Iterable[float], digits: int = 3) -> str:
    """A mean with its 95 % interval in words: "0.213 ± 0.004"."""
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}" if math.isfinite(half) else f"{mean:.{digits}f}"
