"""subspace: do adapters of different ranks, and of different seeds, learn the same directions? φ with its control.

Adapters that are compared begin from different draws of A and see the rows in different orders: with one seed the
first rows of A would be the same numbers at r = 8 and at r = 64, and φ would find them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_core.experiments.experiment import Experiment, Row
from lora_core.experiments.lab import Cell
from lora_core.experiments.training import ranks_for, trained
from lora_core.experiments.verdicts import above, by, every, interval, learnt, paired, per_seed, pm, unlearnt, verdict
from lora_core.spec import LoraSpec

if TYPE_CHECKING:
    from lora_core.experiments.lab import Lab

TARGETS, RANKS = ("q", "v"), (8, 64)
APART = 1000  # seeds of adapters that are compared differ by this
SHORT = (" The runs are short and see their rows in other orders, so that much of A is still what was drawn; and the"
         " head shares the work.")  # fmt: skip
AT = (1, 2, 4, 8, 16, 32, 64)


def run(lab: Lab) -> list[Row]:
    """Per seed an adapter of the small rank and two of the large one, compared in every matrix."""
    cells = [Cell(f"seed {s}", lambda s=s: _compare(lab, s)) for s in lab.seeds]
    return [row for rows in lab.run(cells).values() for row in rows]


def grid(V1: np.ndarray, V2: np.ndarray) -> list[list[float]]:
    """φ(i, j) for i and j in 1, 2, 4, … from the right-singular vectors V1 (n1, in) and V2 (n2, in), as rows.

    φ = Σσ²/min(i, j) (section 7.2): the sum of the squared entries of the corner of V1·V2ᵀ. The appendix's formula
    for φ out of the projection distance is misprinted; this is equation 4.
    """
    C = ((V1 @ V2.T) ** 2).cumsum(0).cumsum(1)
    at = [[k for k in AT if k <= n] for n in C.shape]
    return [[round(float(C[i - 1, j - 1] / min(i, j)), 4) for j in at[1]] for i in at[0]]


def _directions(M: Any) -> np.ndarray:
    return np.linalg.svd(np.asarray(M, np.float64), full_matrices=False)[2]


def _compare(lab: Lab, seed: int) -> list[Row]:
    model, _ = lab.encoder()
    small, large = (ranks_for(model, TARGETS, (r,))[0] for r in RANKS)
    gain = float("inf")  # of the one that learnt least
    found: list[dict[str, tuple[str, int | None, np.ndarray, np.ndarray]]] = []
    for i, rank in enumerate((small, large, large)):
        spec = LoraSpec(targets=TARGETS, rank=rank, alpha=16)
        with trained(lab, {"a": spec}, seed=seed + APART * i, steps=lab.steps(60, 120), lr=5e-3) as t:
            a = t.adapters["a"]
            gain = min(gain, t.figures[None]["loss"] - t.figures["a"]["loss"])
            found.append({k: (s.target, s.layer, _directions(a.factors(k).A.detach()),
                               a.delta(k).double().svd()[2].numpy()) for k, s in a.sites.items()})  # fmt: skip
    noise = np.random.default_rng(seed)
    rows: list[Row] = []
    for key, (target, layer, A8, D8) in found[0].items():
        A64, D64, B64 = found[1][key][2], found[1][key][3], found[2][key][2]
        in_ = A8.shape[1]
        control = [_directions(noise.standard_normal((r, in_))) for r in (small, large)]
        for of, pair, V1, V2 in (
            ("A", "ranks", A8, A64), ("A", "seeds", A64, B64), ("ΔW", "ranks", D8, D64),
            ("ΔW", "seeds", D64, found[2][key][3]), ("Gaussian", "ranks", *control),
        ):  # fmt: skip
            rows.append({"seed": seed, "gain": gain, "target": target, "layer": layer, "in": in_, "of": of,
                         "pair": pair, "ranks": [len(V1), len(V2)], "phi": grid(V1, V2),
                         "top": float((V1[0] @ V2[0]) ** 2),
                         "small": float((np.square(V1[:small] @ V2.T)).sum() / small)})  # fmt: skip
    return rows


def judge(rows: Sequence[Row]) -> tuple[str, str]:
    """φ(1, 1) of A above a half, for q and v, between the ranks; above the Gaussian control also between seeds."""
    gains = per_seed(rows, "gain").values()
    if not learnt(gains):
        return unlearnt(gains)
    control = per_seed(rows, "top", of="Gaussian")
    top = {(of, pair): per_seed(rows, "top", of=of, pair=pair) for of in ("A", "ΔW") for pair in ("ranks", "seeds")}
    shared = every(above(per_seed(rows, "top", of="A", pair="ranks", target=t).values(), 0.5) for t in TARGETS)
    more = every(above(paired(top["A", pair], control)) for pair in ("ranks", "seeds"))
    r1, r2 = by(rows, of="A", pair="ranks")[0]["ranks"]
    wide = per_seed(rows, "small", of="A", pair="ranks")
    analytic = max(r1, r2) / rows[0]["in"]
    each = {(t, k): per_seed(rows, "top", of="A", pair="ranks", target=t, layer=k).values()
            for t, k in dict.fromkeys((r["target"], r["layer"]) for r in rows)}  # fmt: skip
    (t, k), peak = max(each.items(), key=lambda e: interval(e[1])[0])
    return verdict([shared, more]), (
        f"The top directions of A at rank {r1} and at rank {r2} are the same to φ = {pm(top['A', 'ranks'].values())}"
        f" (1: the same, 0: at right angles; mean over matrices, most in {t} of layer {k + 1}: {pm(peak, 2)}); those"
        f" of two seeds of rank {r2} to {pm(top['A', 'seeds'].values())}, of Gaussian matrices to"
        f" {pm(control.values())}. All {r1} directions lie in the {r2} to φ = {pm(wide.values())}, where chance gives"
        f" {analytic:.3f}. Read from ΔW instead of A the first two are {pm(top['ΔW', 'ranks'].values())} and"
        f" {pm(top['ΔW', 'seeds'].values())}.{'' if shared else SHORT}"
    )


EXPERIMENT = Experiment(
    name="subspace",
    question="Do adapters of rank 8 and rank 64, or of two seeds, learn the same directions?",
    section="7.2",
    claim="The top singular direction of A is shared between r = 8 and r = 64 (φ above 0.5), the others hardly: so the"
          " adaptation needs few directions. Two seeds share more directions than two random matrices do.",
    choices=("All eight directions of the small one are in the large one.",
             "The top direction is shared, the rest is mostly noise.",
             "Nothing is shared: every run finds its own directions."),
    answer=1,
    paper={"model": "GPT-3 175B, layer 48 of 96", "figures": "3 and 4", "φ(1, 1) of r = 8 and 64": "above 0.5"},
    run=run,
    judge=judge,
)  # fmt: skip
