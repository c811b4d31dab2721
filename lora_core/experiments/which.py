"""which: which matrices should be adapted? Equal numbers of parameters for single ones, pairs, all, and the MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_core.experiments.experiment import Experiment, Row
from lora_core.experiments.lab import Cell
from lora_core.experiments.training import sites_of, trained
from lora_core.experiments.verdicts import above, by, every, interval, learnt, paired, per_seed, pm, unlearnt, verdict
from lora_core.spec import LoraSpec

if TYPE_CHECKING:
    from lora_core.experiments.lab import Lab

RANK, ALPHA = 20, 16.0  # of a single attention matrix: |Θ| = 15,360 a layer in MiniLM
SETS = ("q", "k", "v", "o", "q,k", "q,v", "q,k,v,o", "gate", "up", "down", "up,down", "gate,up,down",
        "q,k,v,o,gate,up,down")  # fmt: skip
FEW = ("q", "k", "v", "q,v", "q,k,v,o", "up,down")  # in the quick version, with the last: all
SLACK = 0.02  # nats: as good as the best means no more than this above it


def run(lab: Lab) -> list[Row]:
    """All sets with each seed; in the full version at two or three rates, of which each set keeps its best."""
    rates = lab.choose((5e-3,), (2e-3, 5e-3, 1e-2))
    cells = [Cell(f"seed {s}, rate {lr:g}", lambda s=s, lr=lr: _train(lab, s, lr)) for s in lab.seeds for lr in rates]
    rows = [row for found in lab.run(cells).values() for row in found]
    mean: dict[str, dict[float, float]] = {}
    for n, lr in {(r["targets"], r["lr"]) for r in rows}:
        mean.setdefault(n, {})[lr] = interval([r["loss"] for r in by(rows, targets=n, lr=lr)])[0]
    return [{**r, "best": r["lr"] == min(mean[r["targets"]], key=lambda lr: mean[r["targets"]][lr])} for r in rows]


def asked(lab: Lab, lr: float) -> dict[str, LoraSpec]:
    """The sets that are trained at a rate: few of attention's matrices need a higher one, many bear less."""
    specs = equal_specs(lab.encoder()[0])
    wide = {n for n, s in specs.items() if len(s.targets) > 2 or set(s.targets) & {"gate", "up", "down"}}
    skip = wide if lr > 5e-3 else specs.keys() - wide if lr < 5e-3 else ()
    few = {*FEW, next(reversed(specs))} if lab.quick else specs
    return {n: s for n, s in specs.items() if n in few and n not in skip}


def named(specs: Mapping[str, LoraSpec]) -> dict[str, LoraSpec]:
    """The same with names that an adapter can have."""
    return {n.replace(",", "-"): s for n, s in specs.items()}


def equal_specs(model: Any) -> dict[str, LoraSpec]:
    """{name: spec} of every set that the model has, with as nearly equal |Θ| as whole ranks allow.

    All matrices of a set get the largest common rank that the budget allows; what is left goes one by one to them.
    """
    cost: dict[str, int] = {}
    side = {}
    for s in sites_of(model, tuple("q k v o gate up down".split())):
        cost[s.target] = cost.get(s.target, 0) + s.out + s.in_
        side[s.target] = min(side.get(s.target, s.out), s.out, s.in_)
    budget = min(RANK, side["q"]) * cost["q"]
    sets = dict.fromkeys(tuple(t for t in name.split(",") if t in cost) for name in SETS)
    specs = {}
    for targets in filter(None, sets):
        rank = max(1, budget // sum(cost[t] for t in targets))
        ranks = {t: min(rank, side[t]) for t in targets}
        for t in targets:
            if ranks[t] < side[t] and sum(ranks[u] * cost[u] for u in targets) + cost[t] <= budget:
                ranks[t] += 1
        specs[",".join(targets)] = LoraSpec(targets=targets, rank=min(ranks.values()), alpha=ALPHA, rank_pattern=ranks)
    return specs


def _train(lab: Lab, seed: int, lr: float) -> list[Row]:
    specs = named(asked(lab, lr))
    with trained(lab, specs, seed=seed, steps=lab.steps(50, 60), lr=lr) as t:
        return [{"targets": ",".join(spec.targets), "ranks": dict(spec.rank_pattern), "seed": seed, "lr": lr,
                 "trainable": sum(p.numel() for k, p in t.adapters[n].named_parameters() if k.endswith((".A", ".B"))),
                 "base_loss": t.figures[None]["loss"], **t.figures[n]} for n, spec in specs.items()]  # fmt: skip


def judge(rows: Sequence[Row]) -> tuple[str, str]:
    """q and v together beat q and k alone, and are no more than 0.02 nats behind any other choice of attention's."""
    rows = by(rows, best=True)
    gains = [r["base_loss"] - r["loss"] for r in rows if r["targets"] == "q,v"]
    if not learnt(gains):
        return unlearnt(gains)
    loss = {n: per_seed(rows, "loss", targets=n) for n in dict.fromkeys(r["targets"] for r in rows)}
    mean = {n: interval(v.values())[0] for n, v in loss.items()}
    attention = [n for n in loss if set(n.split(",")) <= set("qkvo") and n != "q,v"]
    alone = every(above(paired(loss[n], loss["q,v"])) for n in ("q", "k"))
    best = every(above(paired(loss[n], loss["q,v"]), -SLACK) for n in attention)
    order = sorted(mean, key=lambda n: mean[n])
    return verdict([alone, best]), (
        f"At {rows[0]['trainable']:,} parameters q,v ends at {pm(loss['q,v'].values())} nats, q alone at"
        f" {pm(loss['q'].values())}, k alone at {pm(loss['k'].values())}. Lowest of all is {order[0]}"
        f" ({pm(loss[order[0]].values())}), highest {order[-1]} ({pm(loss[order[-1]].values())})."
    )


EXPERIMENT = Experiment(
    name="which",
    question="Given a budget of parameters, which weight matrices should one adapt?",
    section="7.1",
    claim="Adapting q and v together gives the best result; all parameters in q or in k alone are clearly worse. The"
          " MLP is left out.",
    choices=("One matrix at a high rank: q alone.",
             "q and v together at half the rank.",
             "It does not matter where the parameters are."),
    answer=1,
    paper={"model": "GPT-3 175B, 18M parameters", "targets": ["q", "k", "v", "o", "q,k", "q,v", "q,k,v,o"],
           "rank": [8, 8, 8, 8, 4, 4, 2], "WikiSQL ±0.5": [70.4, 70.0, 73.0, 73.2, 71.4, 73.7, 73.7],
           "MultiNLI ±0.1": [91.0, 90.8, 91.0, 91.3, 91.3, 91.3, 91.7]},
    run=run,
    judge=judge,
)  # fmt: skip
