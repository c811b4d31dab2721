"""Training as the experiments need it: many specs in one batch, measured, and taken off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
BATCH = 8
EVERY = 10  # steps that a point of a curve is the mean of
WARMUP = 0.2  # of the steps; with a shorter one the higher rates end in a head that guesses, by bad luck
LONGEST = 15  # tokens of a review; longer ones are left out
PULL = 1e-2  # towards 0, on the weights of the head that training begins with


@dataclass(frozen=True)
class Trained:
    """Trained adapters while they are attached. rows: held out.

    figures: {name, or None for the base: loss and accuracy on those rows}
    seed:   that drew A and the order of the rows
    curves: {name: the mean training loss of every ten steps}
    """

    model: Any
    task: Task
    objective: Objective
    rows: list[Row]
    adapters: dict[str, Adapter]
    figures: dict[str | None, dict[str, float]]
    curves: dict[str, list[float]]
    seed: int


@contextmanager
def trained(lab: Lab, specs: Mapping[str, LoraSpec], *, seed: int, steps: int, lr: float, batch: int = BATCH,
            task: str = "sentiment", rows: int = 600, share: float = 1.0, start: float = 0.0, held: int | None = None,
            longest: int | None = None) -> Iterator[Trained]:  # fmt: skip
    """Train the specs together on a built-in task; the adapters are detached when the block is left.

    The sentiment task runs on the encoder, with a head that has been fitted before (`warm_head`) and that each spec
    trains too; all others on the writer. The rows are the same for every seed, which draws A and the order of the rows.
    share: how much of the present cell this is, from `start` on; held: how many held-out rows are measured, 256 texts
    (128 in the quick version) or 32 completions unless told; longest: rows of more tokens are left out, of reviews
    those of more than 15.
    """
    import lora_core as lc
    from lora_core.classification import drawn_modules
    from lora_core.evaluate import spread

    classify = task == "sentiment"
    model, tokenizer = lab.encoder() if classify else lab.writer()
    data = lc.load_task(task, seed=0, train=rows, test=2 * HELD if classify else HELD)
    extra = drawn_modules(model) if classify else ()
    specs = {n: replace(s, full=tuple(dict.fromkeys([*s.full, *extra]))) for n, s in specs.items()}
    config = lc.TrainConfig(steps=steps, batch_size=batch, lr=lr, warmup=WARMUP, seed=seed, eval_rows=0,
                            eval_every=steps)  # fmt: skip
    goal: Any = (lc.Classification(model, tokenizer) if classify else lc.CausalLM(model, tokenizer, data.template))
    longest = longest or (LONGEST if classify else None)
    if longest is not None:
        data = replace(data, **{k: short(goal, getattr(data, k), longest) for k in ("train", "test")})
    kept = spread(data.test, held or (lab.choose(HELD // 2, HELD) if classify else 32))
    losses: dict[str, list[float]] = {n: [] for n in specs}
    with warm_head(lab, goal, data.train):
        try:
            total = steps * len(specs)
            for i, e in enumerate(lc.sweep(model, specs, data, config, objective=goal, tokenizer=tokenizer)):
                if e.event.kind == "step":
                    losses[e.name].append(e.event.loss or 0.0)
                    lab.at(start + min(1.0, i / total) * share * 0.9)
            figures = lc.measure(goal, kept, adapters=[None, *specs])
            curves = {n: [sum(v[i : i + EVERY]) / len(v[i : i + EVERY]) for i in range(0, len(v), EVERY)]
                      for n, v in losses.items()}  # fmt: skip
            yield Trained(model, data, goal, kept, {n: lc.get_adapter(model, n) for n in specs}, figures, curves,
                          seed)  # fmt: skip
        finally:
            detach_all(model)


def short(goal: Objective, rows: Sequence[Row], longest: int) -> tuple[Row, ...]:
    """The rows of at most so many tokens; all of them where there are none."""
    return tuple(r for r, e in zip(rows, goal.encode(rows), strict=True) if len(e) <= longest) or tuple(rows)


@contextmanager
def warm_head(lab: Lab, goal: Objective, rows: Sequence[Row]) -> Iterator[None]:
    """Within the block the classifier's head is fitted to the frozen model, afterwards it is what it was.

    What flows back through a head that was drawn at random points nowhere, so that training would begin with some fifty
    steps in which only the head learns. Fitted by logistic regression (`PULL` keeps its weights small), every spec
    begins with what the last layer alone can do. Without a random linear head nothing is done.
    """
    import torch
    import torch.nn.functional as F

    model: Any = goal.model
    drawn = getattr(getattr(model, "lora_lab", None), "drawn", ())
    paths = {n.rpartition(".")[0] for n in drawn}
    head = model.get_submodule(next(iter(paths))) if len(paths) == 1 else None
    if not isinstance(head, torch.nn.Linear):
        yield
        return

    def fit() -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        labels: list[torch.Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
        try:
            with torch.no_grad():
                items: Any = goal.encode(rows)
                for i in range(0, len(items), 32):
                    b: Any = goal.batch(items[i : i + 32])
                    goal.loss(b)
                    labels.append(b.labels)
        finally:
            hook.remove()
        x, y = torch.cat(seen), torch.cat(labels)
        if x.ndim != 2:  # a head that is asked at every token
            return []
        found = [torch.zeros_like(p).requires_grad_() for p in params]
        solver = torch.optim.LBFGS(found, max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            solver.zero_grad()
            value = F.cross_entropy(F.linear(x, *found), y) + PULL * found[0].square().sum()
            value.backward()
            return value

        solver.step(loss)
        return [p.detach() for p in found]

    params = list(head.parameters())  # an adapter that is attached within the block adds its own
    was = [p.detach().clone() for p in params]
    model.eval()
    fitted = lab.keep(f"head of {len(rows)} rows", fit) or was
    try:
        with torch.no_grad():
            for p, v in zip(params, fitted, strict=True):
                p.copy_(v)
        yield
    finally:
        with torch.no_grad():
            for p, v in zip(params, was, strict=True):
                p.copy_(v)


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
