"""Specs of many kinds trained for comparison, each at its own best learning rate: what `methods` and `generalises` do.

One rate for all would favour whatever it suits: a prefix wants a hundred times what full fine-tuning can stand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_core.experiments.experiment import Row
from lora_core.experiments.lab import Cell
from lora_core.experiments.training import trained
from lora_core.spec import LoraSpec

if TYPE_CHECKING:
    from lora_core.experiments.lab import Lab


@dataclass(frozen=True)
class Rival:
    """A spec and the learning rates to try, in rising order; what else its rows should say."""

    spec: LoraSpec
    rates: tuple[float, ...]
    says: Mapping[str, Any]

    @property
    def alone(self) -> bool:
        """Whether it cannot share a batch: position embeddings, which all rows have in common, are trained."""
        return "all" in self.spec.full


def compare(lab: Lab, make: Callable[[], Mapping[str, Rival]], rates: Sequence[float], steps: int) -> list[Row]:
    """A row for each of the rivals and seeds. rates: all that they try.

    The full version tunes first, on a seed that is none of the lab's; the quick one takes the middle of each one's
    rates. A row has what the rival says, seed, lr, edge (the best rate was the first or last that was tried: a better
    one may lie beyond), trainable (without the classifier's head, which all of them train), base_loss, the held-out
    loss and accuracy, and train_loss, the mean of the last ten steps.
    """

    def rivals() -> Mapping[str, Rival]:
        return lab.keep("rivals", make)

    def tune(lr: float) -> dict[str, float]:
        mine = {n: r for n, r in rivals().items() if lr in r.rates}
        return {n: row["loss"] for n, row in _train(lab, mine, 1000 + max(lab.seeds), lr, steps, (0.0, 1.0)).items()}

    def race(seed: int) -> list[Row]:
        best = {n: r.rates[len(r.rates) // 2] for n, r in rivals().items()}
        if not lab.quick:
            assert lab.cells is not None
            found = {lr: lab.cells.values[f"tune {lr:g}"] for lr in rates}
            best = {n: min(r.rates, key=lambda lr: found[lr][n]) for n, r in rivals().items()}
        rows: dict[str, Row] = {}
        for lr in sorted(set(best.values())):
            group = {n: r for n, r in rivals().items() if best[n] == lr}
            part = len(rows) / len(best), (len(rows) + len(group)) / len(best)
            for n, row in _train(lab, group, seed, lr, steps, part).items():
                edge = not lab.quick and lr in (group[n].rates[0], group[n].rates[-1])
                rows[n] = {**group[n].says, "seed": seed, "lr": lr, "edge": edge, **row}
        return [rows[n] for n in best]

    cells = [] if lab.quick else [Cell(f"tune {lr:g}", lambda lr=lr: tune(lr)) for lr in rates]
    cells += [Cell(f"seed {s}", lambda s=s: race(s), 1.5) for s in lab.seeds]
    found = lab.run(cells)
    return [row for s in lab.seeds for row in found[f"seed {s}"]]


def _train(lab: Lab, rivals: Mapping[str, Rival], seed: int, lr: float, steps: int,
           part: tuple[float, float]) -> dict[str, Row]:  # fmt: skip
    """{name: figures} of rivals at one rate; part: from which share of the cell to which."""
    rows: dict[str, Row] = {}
    together = {n: r.spec for n, r in rivals.items() if not r.alone}
    groups = [together] if together else []
    groups += [{n: r.spec} for n, r in rivals.items() if r.alone]
    first, last = part
    for group in groups:
        start = first + (last - first) * len(rows) / len(rivals)
        share = (last - first) * len(group) / len(rivals)
        with trained(lab, group, seed=seed, steps=steps, lr=lr, share=share, start=start) as t:
            for n in group:
                a = t.adapters[n]
                head = 0 if rivals[n].alone else sum(p.numel() for k, p in a.copies.items() if k in _head(t.model))
                rows[n] = {"trainable": sum(p.numel() for p in a.parameters()) - head,
                           "base_loss": t.figures[None]["loss"], **t.figures[n],
                           "train_loss": t.curves[n][-1]}  # fmt: skip
    return rows


def _head(model: Any) -> frozenset[str]:
    """The names of a head that was drawn at random."""
    return frozenset(getattr(getattr(model, "lora_lab", None), "drawn", ()))
