"""which: which matrices should be adapted? Equal numbers of parameters for single ones, pairs, all, and the MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_core.experiments.experiment import Experiment, Row
from lora_core.experiments.lab import Cell
from lora_core.experiments.training import best_rates, sites_of, trained, tuning
from lora_core.experiments.verdicts import above, every, interval, learnt, paired, per_seed, pm, unlearnt, verdict
from lora_core.spec import LoraSpec

if TYPE_CHECKING:
    from lora_core.experiments.lab import Lab

RANK, ALPHA = 20, 16.0  # of a single attention matrix: |Θ| = 15,360 a layer in MiniLM
SETS = ("q", "k", "v", "o", "q,k", "q,v", "q,k,v,o", "gate", "up", "down", "up,down", "gate,up,down",
        "q,k,v,o,gate,up,down")  # fmt: skip
FEW = ("q", "k", "v", "q,v", "q,k,v,o", "up,down", "q,k,v,o,up,down")  # in the quick version
RATES = (2e-3, 5e-3, 1e-2)
SLACK = 0.02  # nats: as good as the best means no more than this above it


def run(lab: Lab) -> list[Row]:
    """All sets with each seed, each at its own best rate: found with another seed in the full version, else by width."""
    steps = lab.steps(50, 60)

    def specs() -> dict[str, LoraSpec]:
        found = equal_specs(lab.encoder()[0])
        return {n: s for n, s in found.items() if not lab.quick or n in FEW}

    cells = [] if lab.quick else tuning(lab, lambda: named(specs()), RATES, steps=steps)
    cells += [Cell(f"seed {s}", lambda s=s: _train(lab, s, specs(), steps)) for s in lab.seeds]
    found = lab.run(cells)
    return [row for s in lab.seeds for row in found[f"seed {s}"]]


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


def _train(lab: Lab, seed: int, sets: Mapping[str, LoraSpec], steps: int) -> list[Row]:
    specs = named(sets)
    best = {n: RATES[len(s.targets) < 3] for n, s in specs.items()} if lab.quick else best_rates(lab, RATES)
    rows: list[Row] = []
    rates = sorted(set(best.values()))
    for lr in rates:
        mine = {n: s for n, s in specs.items() if best[n] == lr}
        with trained(lab, mine, seed=seed, steps=steps, lr=lr, share=len(mine) / len(specs)) as t:
            rows += [{"targets": ",".join(spec.targets), "ranks": dict(spec.rank_pattern), "seed": seed, "lr": lr,
                      "trainable": sum(p.numel() for k, p in t.adapters[n].named_parameters()
                                       if k.endswith((".A", ".B"))),
                      "base_loss": t.figures[None]["loss"], **t.figures[n]} for n, spec in mine.items()]  # fmt: skip
    order = [s.targets for s in specs.values()]
    return sorted(rows, key=lambda r: order.index(tuple(r["targets"].split(","))))


def judge(rows: Sequence[Row]) -> tuple[str, str]:
    """q and v together beat q and k alone, and are no more than 0.02 nats behind any other choice of attention's."""
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
