"""Training as the experiments need it: many specs in one batch, measured, and taken off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_core.spec import LoraSpec

if TYPE_CHECKING:
    from lora_core.adapter import Adapter
    from lora_core.experiments.lab import Lab
    from lora_core.objective import Objective
    from lora_core.sites import Site
    from lora_core.tasks import Row, Task

HELD = 256  # held-out rows that everything is measured on


@dataclass(frozen=True)
class Trained:
    """Trained adapters while they are attached. rows: held out.

    figures: {name, or None for the base: loss and accuracy on those rows}
    """

    model: Any
    task: Task
    objective: Objective
    rows: list[Row]
    adapters: dict[str, Adapter]
    figures: dict[str | None, dict[str, float]]


@contextmanager
def trained(lab: Lab, specs: Mapping[str, LoraSpec], *, seed: int, steps: int, lr: float, batch: int | None = None,
            task: str = "sentiment", rows: int = 400, share: float = 1.0,
            held: int | None = None) -> Iterator[Trained]:  # fmt: skip
    """Train the specs together on a built-in task; the adapters are detached when the block is left.

    The sentiment task runs on the encoder, whose random head each spec trains too; all others on the writer. The rows
    are the same for every seed, which draws A and the order of the rows. share: how much of the present cell this is;
    batch: rows in a step, 16 unless told; held: how many held-out rows are measured, 256 texts or 32 completions
    unless told. The quick version takes half of either.
    """
    import lora_core as lc
    from lora_core.classification import drawn_modules
    from lora_core.evaluate import spread

    classify = task == "sentiment"
    model, tokenizer = lab.encoder() if classify else lab.writer()
    data = lc.load_task(task, seed=0, train=rows, test=HELD)
    extra = drawn_modules(model) if classify else ()
    specs = {n: replace(s, full=tuple(dict.fromkeys([*s.full, *extra]))) for n, s in specs.items()}
    config = lc.TrainConfig(steps=steps, batch_size=batch or lab.choose(8, 16), lr=lr, seed=seed, eval_rows=0,
                            eval_every=steps)  # fmt: skip
    goal: Any = (lc.Classification(model, tokenizer) if classify else lc.CausalLM(model, tokenizer, data.template))
    kept = spread(data.test, held or (lab.choose(HELD // 2, HELD) if classify else 32))
    try:
        total = steps * len(specs)
        for i, e in enumerate(lc.sweep(model, specs, data, config, objective=goal, tokenizer=tokenizer)):
            if e.event.kind == "step":
                lab.at(min(1.0, i / total) * share * 0.9)
        figures = lc.measure(goal, kept, adapters=[None, *specs])
        yield Trained(model, data, goal, kept, {n: lc.get_adapter(model, n) for n in specs}, figures)
    finally:
        detach_all(model)


def detach_all(model: Any) -> None:
    """Take off whatever is attached."""
    from lora_core.registry import book_of

    for a in list(book_of(model).adapters.values()):
        a.detach()


def sites_of(model: Any, targets: tuple[str, ...]) -> list[Site]:
    """The matrices of the model that these names hit."""
    from lora_core.sites import find_sites

    return [s for s in find_sites(model) if s.target in targets]


def ranks_for(model: Any, targets: tuple[str, ...], ranks: tuple[int, ...]) -> list[int]:
    """Those ranks, cut to what the smallest of the matrices can have."""
    most = min(min(s.out, s.in_) for s in sites_of(model, targets))
    return sorted({min(r, most) for r in ranks})
