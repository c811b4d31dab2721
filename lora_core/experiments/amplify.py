"""amplify: how does ΔW compare with W? W seen in the directions of ΔW, in its own, and in random ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lora_core.experiments.experiment import Experiment, Row
from lora_core.experiments.lab import Cell
from lora_core.experiments.training import ranks_for, trained
from lora_core.experiments.verdicts import above, every, interval, learnt, paired, per_seed, pm, unlearnt, verdict
from lora_core.spec import LoraSpec

if TYPE_CHECKING:
    from lora_core.experiments.lab import Lab

TARGETS, RANKS = ("q", "v"), (4, 64)
LINKED = 2.0  # times chance: "more related to W than random"; the paper's table has 16 at r = 4 and 6 at r = 64


def run(lab: Lab) -> list[Row]:
    """Both ranks in one batch, for each seed; a row for every adapted matrix."""
    cells = [Cell(f"seed {s}", lambda s=s: _look(lab, s)) for s in lab.seeds]
    return [row for rows in lab.run(cells).values() for row in rows]


def _look(lab: Lab, seed: int) -> list[Row]:
    import lora_core as lc

    model, _ = lab.encoder()
    specs = {f"r{r}": LoraSpec(targets=TARGETS, rank=r, alpha=16) for r in ranks_for(model, TARGETS, RANKS)}
    noise = np.random.default_rng(seed)
    rows: list[Row] = []
    with trained(lab, specs, seed=seed, steps=lab.steps(60, 120), lr=5e-3) as t:
        for name, spec in specs.items():
            a = t.adapters[name]
            for key, delta in a.deltas().items():
                W = a.W0(key).double().numpy()
                U, S, Vh = (x.numpy() for x in delta.double().svd())
                sigma = np.linalg.svd(W, compute_uv=False)
                r, (out, in_) = len(S), W.shape
                Q, P = (np.linalg.qr(noise.standard_normal((n, r)))[0] for n in (out, in_))
                rows.append({
                    "seed": seed, "target": a.sites[key].target, "layer": a.sites[key].layer, "rank": spec.rank,
                    "gain": t.figures[None]["loss"] - t.figures[name]["loss"],
                    "norm_W": float(np.linalg.norm(W)), "norm_delta": float(np.sqrt((S * S).sum())),
                    "of_delta": float(np.linalg.norm(U.T @ W @ Vh.T)), "of_W": float(np.sqrt((sigma[:r] ** 2).sum())),
                    "of_random": float(np.linalg.norm(Q.T @ W @ P)),
                    "random_formula": float(r * np.linalg.norm(W) / math.sqrt(out * in_)),
                    "amplification": lc.amplification(delta, W),
                })  # fmt: skip
    return [{**r, "over_random": r["of_delta"] / r["random_formula"], "over_W": r["of_delta"] / r["of_W"]}
            for r in rows]  # fmt: skip


def judge(rows: Sequence[Row]) -> tuple[str, str]:
    """Twice as much of W in ΔW's directions as in random ones; less than half of W's top; rank 4 amplifies more."""
    gains = per_seed(rows, "gain").values()
    if not learnt(gains):
        return unlearnt(gains)
    low, high = min(r["rank"] for r in rows), max(r["rank"] for r in rows)
    chance = per_seed(rows, "over_random", rank=low)
    linked = above(chance.values(), LINKED)
    fresh = above([0.5 - v for v in per_seed(rows, "over_W", rank=low).values()])
    a, b = (per_seed(rows, "amplification", rank=k) for k in (low, high))
    focused = every([above(paired(a, b)), above(a.values(), 1.0)])
    grow = [interval(per_seed(rows, c, rank=low).values())[0] for c in ("of_delta", "of_W", "random_formula")]
    blind = interval([r["norm_delta"] / r["random_formula"] for r in rows if r["rank"] == low])[0]
    return verdict([linked, fresh, focused]), (
        f"At rank {low} W is {grow[0]:.3f} large (‖UᵀWVᵀ‖) in the directions of ΔW, {grow[1]:.2f} in W's own top ones"
        f" and {grow[2]:.3f} in random ones: {pm(chance.values(), 2)} times chance. ΔW is {pm(a.values(), 1)} times"
        f" what W has there at rank {low} and {pm(b.values(), 1)} times at rank {high} (means over matrices); an update"
        f" of the same size in random directions would come to {blind:.1f} at rank {low}."
    )


EXPERIMENT = Experiment(
    name="amplify",
    question="How does ΔW compare with W? Does it repeat W's top directions?",
    section="7.3",
    claim="ΔW is more related to W than a random matrix is, but does not repeat W's top directions: it amplifies ones"
          " that W has but does not stress, by a large factor (about 21 at r = 4, about 2 at r = 64).",
    choices=("It strengthens the directions that are already the strongest.",
             "It amplifies directions that W has but does not stress.",
             "It has nothing to do with W: as good as random."),
    answer=1,
    paper={"model": "GPT-3 175B, Wq of layer 48", "‖W‖": 61.95, "rank": [4, 64], "of ΔW": [0.32, 1.90],
           "of W": [21.67, 37.71], "random": [0.02, 0.33], "‖ΔW‖": [6.91, 3.57], "amplification": [21.5, 1.88]},
    run=run,
    judge=judge,
)  # fmt: skip
