"""methods: the existing solutions against LoRA, at equal numbers of trained parameters and over a range of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_core.experiments.experiment import Experiment, Row
from lora_core.experiments.rivals import Rival, compare
from lora_core.experiments.verdicts import above, by, every, interval, learnt, paired, per_seed, pm, unlearnt, verdict

if TYPE_CHECKING:
    from lora_core.experiments.lab import Lab

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TRIED = {"full": RATES[0:3], "last-layer": RATES[1:4], "bitfit": RATES[3:6], "bottleneck": RATES[3:6],
         "prefix": RATES[4:7], "lora": RATES[2:5], "lora-prefix": RATES[2:5]}  # fmt: skip
EQUAL = 4  # the rank of q and v that says how many parameters all have, where they are compared
RANKS = (1, 4, 16)  # and those of the curve over budgets
SIZED = ("lora", "bottleneck", "prefix", "lora-prefix")
SLACK = 0.02  # nats: as good as means no more than this above


def run(lab: Lab) -> list[Row]:
    """Every method; those that have a size at one budget, in the full version at three."""
    return compare(lab, lambda: rivals(lab), RATES, lab.steps(50, 80))


def rivals(lab: Lab) -> dict[str, Rival]:
    """{name: Rival}: sizes as near to the number of parameters of LoRA as they come."""
    from lora_core.budget import budget
    from lora_core.methods import METHODS, method_spec, size_for

    model, _ = lab.encoder()
    found = {}
    for name in METHODS:
        if name not in SIZED:
            found[name] = Rival(method_spec(name), TRIED[name], {"method": name, "size": None, "budget": None})
            continue
        sizes: set[int] = set()
        for rank in sorted(lab.choose((EQUAL,), RANKS), key=lambda r: r != EQUAL):
            size = size_for(model, name, budget(model, method_spec("lora", rank)).trainable)
            if size not in sizes:  # a method's smallest may stand for two budgets
                sizes.add(size)
                says = {"method": name, "size": size, "budget": rank}
                found[f"{name}-{size}"] = Rival(method_spec(name, size), TRIED[name], says)
    return found


def front(rows: Sequence[Row]) -> list[tuple[str, int, float]]:
    """(method, parameters, mean loss) of those that no other one beats with as few parameters, from few to many."""
    points: dict[tuple[str, int], list[float]] = {}
    for r in rows:
        points.setdefault((r["method"], r["trainable"]), []).append(r["loss"])
    best: list[tuple[str, int, float]] = []
    for (name, n), losses in sorted(points.items(), key=lambda p: (p[0][1], interval(p[1])[0])):
        loss = interval(losses)[0]
        if not best or loss < best[-1][2]:
            best.append((name, n, loss))
    return best


def judge(rows: Sequence[Row]) -> tuple[str, str]:
    """LoRA no more than 0.02 nats behind any of the small methods at equal budget, nor behind full fine-tuning."""
    from lora_core.methods import METHODS

    lora = per_seed(rows, "loss", method="lora", budget=EQUAL)
    gains = [r["base_loss"] - r["loss"] for r in by(rows, method="lora", budget=EQUAL)]
    if not learnt(gains):
        return unlearnt(gains)
    others = {n: per_seed(rows, "loss", method=n, budget=EQUAL if n in SIZED else None)
              for n in dict.fromkeys(r["method"] for r in rows) if n != "lora"}  # fmt: skip
    small = [above(paired(others[n], lora), -SLACK) for n in ("bottleneck", "prefix", "bitfit") if others.get(n)]
    full = above(paired(others["full"], lora), -SLACK)
    said = []
    for n, losses in sorted(others.items(), key=lambda o: interval(o[1].values())[0]):
        cost = by(rows, method=n, budget=EQUAL if n in SIZED else None)[0]["trainable"]
        said.append(f"{METHODS[n].title} {pm(losses.values())} ({cost:,})")
    best = ", ".join(f"{METHODS[n].title} at {cost:,}" for n, cost, _ in front(rows))
    return verdict([every(small), full]), (
        f"With {by(rows, method='lora', budget=EQUAL)[0]['trainable']:,} parameters LoRA ends at {pm(lora.values())}"
        f" nats; {', '.join(said)}. No other has as few parameters and less loss than: {best}."
    )


EXPERIMENT = Experiment(
    name="methods",
    question="Aren't existing solutions good enough?",
    section="3 and 5",
    claim="With as many trained parameters LoRA matches or beats adapter layers, prefixes and BitFit, and full"
          " fine-tuning too; with a prefix it can be combined.",
    choices=("Whatever is small learns less than full fine-tuning.",
             "LoRA does at least as well as any, also as full fine-tuning.",
             "All small methods are alike; only the number of parameters counts."),
    answer=1,
    paper={"model": "GPT-2 medium, E2E", "method": ["full", "prefix", "lora"], "parameters M": [354.92, 0.35, 0.35],
           "BLEU": [68.2, 69.7, 70.4]},
    run=run,
    judge=judge,
)  # fmt: skip
