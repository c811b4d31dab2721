"""rank: which rank? The same training at r = 1 … 64, on an easy task, and on another language (full version only)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_core.experiments.experiment import Experiment, Row
from lora_core.experiments.lab import Cell
from lora_core.experiments.training import ranks_for, sites_of, trained
from lora_core.experiments.verdicts import above, by, every, learnt, paired, per_seed, pm, unlearnt, verdict
from lora_core.spec import LoraSpec

if TYPE_CHECKING:
    from lora_core.experiments.lab import Lab

TARGETS, ALPHA = ("q", "v"), 16.0  # α is fixed and s = α/r, as in the paper: the first steps are alike for every rank
POINTS = 0.02  # "competitive": not two points of accuracy below the largest rank
_LANGUAGE: dict[str, Any] = {"task": "new-language", "batch": 4, "rows": 1000, "longest": 22}
SHORT = 0.02  # "falls short": this many nats a token above the largest rank


def run(lab: Lab) -> list[Row]:
    """All ranks in one batch, for each seed; on the language in the full version, with full fine-tuning beside them."""
    ranks = lab.choose((1, 8, 64), (1, 2, 4, 8, 64))
    cells = [Cell(f"sentiment {s}", lambda s=s: _easy(lab, s, ranks), 1) for s in lab.seeds]
    if not lab.quick:
        cells += [Cell(f"new-language {s}", lambda s=s: _language(lab, s), 2) for s in lab.seeds]
        cells += [Cell(f"new-language, full, {s}", lambda s=s: _language_full(lab, s), 2) for s in lab.seeds]
    return [row for rows in lab.run(cells).values() for row in rows]


def _easy(lab: Lab, seed: int, ranks: tuple[int, ...]) -> list[Row]:
    import lora_core as lc

    model, _ = lab.encoder()
    specs = {f"r{r}": LoraSpec(targets=TARGETS, rank=r, alpha=ALPHA) for r in ranks_for(model, TARGETS, ranks)}
    rows: list[Row] = []
    with trained(lab, specs, seed=seed, steps=lab.steps(80, 120), lr=5e-3) as t:
        for name, spec in specs.items():
            stable = [x.stable_rank for x in lc.spectra(t.adapters[name]).values()]
            rows.append({"task": "sentiment", "rank": spec.rank, "seed": seed, "base_loss": t.figures[None]["loss"],
                         **t.figures[name], "stable_rank": float(np.mean(stable))})  # fmt: skip
    return rows


def _part(model: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(all kinds of matrices, the last third of the layers): what the language is learnt with, for time's sake."""
    sites = sites_of(model, ("q", "k", "v", "o", "gate", "up", "down"))
    layers = 1 + max(s.layer or 0 for s in sites)
    return tuple(dict.fromkeys(s.target for s in sites)), tuple(range(layers - max(1, layers // 3), layers))


def _language(lab: Lab, seed: int) -> list[Row]:
    """The same training at the smallest and the largest rank."""
    import lora_core as lc

    model, _ = lab.writer()
    targets, layers = _part(model)
    specs = {f"r{r}": LoraSpec(targets=targets, layers=layers, rank=r, alpha=ALPHA)
             for r in ranks_for(model, targets, (1, 64))}  # fmt: skip
    with trained(lab, specs, seed=seed, lr=5e-3, **_LANGUAGE, steps=lab.steps(40, 40)) as t:
        return [{"task": "new-language", "rank": s.rank, "seed": seed, "base_loss": t.figures[None]["loss"],
                 **t.figures[n], "stable_rank": float(np.mean([x.stable_rank for x in
                                                               lc.spectra(t.adapters[n]).values()]))}
                for n, s in specs.items()]  # fmt: skip


def _language_full(lab: Lab, seed: int) -> list[Row]:
    """Full fine-tuning of the very matrices, as rank 0."""
    model, _ = lab.writer()
    targets, layers = _part(model)
    full = LoraSpec(targets=("norm",), layers=layers,
                    full=tuple(s.path for s in sites_of(model, targets) if s.layer in layers))  # fmt: skip
    with trained(lab, {"full": full}, seed=seed, lr=5e-4, **_LANGUAGE, steps=lab.steps(40, 40)) as t:
        return [{"task": "new-language", "rank": 0, "seed": seed, "base_loss": t.figures[None]["loss"],
                 **t.figures["full"], "stable_rank": None}]  # fmt: skip


def exponent(rows: Sequence[Row]) -> list[float]:
    """p of stable rank ∝ r^p, for each seed: the slope of a line through the logarithms."""
    found = []
    for s in sorted({r["seed"] for r in rows}):
        mine = by(rows, seed=s)
        found.append(float(np.polyfit([math.log(r["rank"]) for r in mine],
                                      [math.log(max(r["stable_rank"], 1e-9)) for r in mine], 1)[0]))  # fmt: skip
    return found


def judge(rows: Sequence[Row]) -> tuple[str, str]:
    """Rank 1 not two points below the largest on the easy task; measurably short of it on the language."""
    easy, hard = by(rows, task="sentiment"), by(rows, task="new-language")
    top = max(r["rank"] for r in easy)
    gains = [r["base_loss"] - r["loss"] for r in by(easy, rank=top)]
    if not learnt(gains):
        return unlearnt(gains)
    one, most = (per_seed(easy, "accuracy", rank=k) for k in (1, top))
    parts = [above(paired(one, most), -POINTS)]
    p = exponent(easy)
    text = (f"On sentiment rank 1 has {pm([100 * v for v in one.values()], 1)} % right and rank {top}"
            f" {pm([100 * v for v in most.values()], 1)} %; of rank {top} the updates use"
            f" {pm(per_seed(easy, 'stable_rank', rank=top).values(), 1)} directions (stable rank), which grow like"
            f" r^{pm(p, 2)}.")  # fmt: skip
    if hard:
        wide = max(r["rank"] for r in hard)
        loss = {k: per_seed(hard, "loss", rank=k) for k in (0, 1, wide)}
        gap, behind = paired(loss[1], loss[wide]), paired(loss[1], loss[0])
        parts.append(every([above(gap, SHORT), above(behind, SHORT)]))
        text += (f" On a new language rank 1 ends at {pm(loss[1].values(), 2)} nats a token, {pm(gap, 2)} above rank"
                 f" {wide} and {pm(behind, 2)} above full fine-tuning of the same matrices.")  # fmt: skip
    return verdict(parts), text


EXPERIMENT = Experiment(
    name="rank",
    question="What is the optimal rank? Is one direction enough?",
    section="7.2",
    claim="A very small rank does as well as a large one (r = 1 for q and v together); only for tasks far from the"
          " pre-training, such as another language, a small rank should not be expected to be enough.",
    choices=("More rank is better all the way.",
             "Rank 1 is about as good as 64 on an easy task.",
             "Rank 1 learns nothing; some 8 are needed."),
    answer=1,
    paper={"model": "GPT-3 175B", "targets": "q,v", "rank": [1, 2, 4, 8, 64],
           "WikiSQL ±0.5": [73.4, 73.3, 73.7, 73.8, 73.5],
           "MultiNLI ±0.1": [91.3, 91.4, 91.3, 91.6, 91.4]},
    run=run,
    judge=judge,
)  # fmt: skip
