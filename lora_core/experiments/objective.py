"""objective: is LoRA agnostic to the training objective? One spec, three objectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_core.experiments.experiment import Experiment, Row
from lora_core.experiments.lab import Cell
from lora_core.experiments.training import WARMUP, detach_all, short, warm_head
from lora_core.experiments.verdicts import above, by, pm, verdict
from lora_core.spec import LoraSpec

if TYPE_CHECKING:
    from lora_core.experiments.lab import Lab
    from lora_core.tasks import Task

SPEC = LoraSpec(targets=("q", "v"), rank=8, alpha=16)
LONGEST = 45  # tokens of a row, for time's sake
NAMES = {"lm": "the next word", "classify": "a label", "preference": "one answer before another"}


def run(lab: Lab) -> list[Row]:
    """Each objective with each seed; the loss on held-out rows before and after."""
    cells = [Cell(f"{goal} {s}", lambda goal=goal, s=s: _train(lab, goal, s), {"classify": 1, "lm": 2}.get(goal, 6))
             for goal in NAMES for s in lab.seeds]  # fmt: skip
    return [row for rows in lab.run(cells).values() for row in rows]


def pairs(task: Task) -> Task:
    """The task with a worse answer for each prompt: the completion of the row after it."""
    def of(rows: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(replace(r, rejected=rows[(i + 1) % len(rows)].completion) for i, r in enumerate(rows))

    return replace(task, train=of(task.train), test=of(task.test))


def _train(lab: Lab, goal: str, seed: int) -> list[Row]:
    import lora_core as lc
    from lora_core.classification import drawn_modules

    classify = goal == "classify"
    model, tokenizer = lab.encoder() if classify else lab.writer()
    task = lc.load_task("sentiment" if classify else "restaurant", train=300, test=128)
    of: Any = (lc.Classification(model, tokenizer) if classify else lc.CausalLM(model, tokenizer, task.template))
    held = 128 if classify else lab.choose(8, 24)
    task = replace(task, train=short(of, task.train, LONGEST), test=short(of, task.test, LONGEST)[:held])
    task = pairs(task) if goal == "preference" else task
    steps = lab.steps(50, 60) if classify else lab.steps(10, 24)
    batch = {"classify": 8, "lm": lab.choose(2, 4), "preference": lab.choose(1, 2)}[goal]
    config = lc.TrainConfig(steps=steps, batch_size=batch, lr=5e-3 if classify else 2e-3, seed=seed, warmup=WARMUP,
                            eval_rows=held, eval_every=steps)  # fmt: skip
    try:
        with warm_head(lab, of, task.train):
            adapter = lc.attach(model, replace(SPEC, full=drawn_modules(model) if classify else ()), "one", seed=seed)
            before = after = None
            for e in lc.train(adapter, task, config, objective=goal, tokenizer=tokenizer):
                lab.at(e.step / steps)
                before = e.held_loss if e.kind == "base" else before
                after = e.held_loss if e.kind == "end" else after
    finally:
        detach_all(model)
    return [{"objective": goal, "seed": seed, "before": before, "after": after, "steps": steps}]


def judge(rows: Sequence[Row]) -> tuple[str, str]:
    """The held-out loss falls under every objective, over the seeds."""
    parts, text = [], []
    for goal, words in NAMES.items():
        mine = by(rows, objective=goal)
        parts.append(above([r["before"] - r["after"] for r in mine]))
        text.append(f"{words}: {pm([r['before'] for r in mine], 2)} to {pm([r['after'] for r in mine], 2)} nats in"
                    f" {mine[0]['steps']} steps")  # fmt: skip
    return verdict(parts), f"With one spec (q and v, r = {SPEC.rank}) the held-out loss goes, of {'; '.join(text)}."


EXPERIMENT = Experiment(
    name="objective",
    question="The proposal is agnostic to the training objective: what does that mean?",
    section="2",
    claim="Nothing in LoRA depends on what is minimised; language modelling is only the motivating use case.",
    choices=("It works with language modelling alone.",
             "The same adapter trains under any loss that has gradients.",
             "It needs another form for each objective."),
    answer=1,
    paper={"numbers": "none; GLUE (classification) and E2E (language modelling) are both used"},
    run=run,
    judge=judge,
)  # fmt: skip
