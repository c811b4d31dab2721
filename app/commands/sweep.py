"""`lora-lab sweep`: many settings on one frozen base, and one table of what came out."""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.commands.options import Alpha, Device, Dtype, Full, Init, Layers, Scaling, spec_of
from app.commands.output import Json, Result, duration, number, table
from lora_core.errors import UserError, unknown

if TYPE_CHECKING:
    from lora_core.spec import LoraSpec
    from lora_core.tasks import Task
    from lora_core.train import TrainConfig, TrainEvent

ENGINES = ("local", "ray")


def sweep(
    model: Annotated[str, typer.Option(help="A model's name, folder or hub id.")] = "smollm2-135m",
    task: Annotated[str | None, typer.Option(help="A built-in task; `lora-lab train --task list` names them.")] = None,
    data: Annotated[Path | None, typer.Option(help="Or your own rows: .txt .tsv .csv .jsonl.")] = None,
    test: Annotated[Path | None, typer.Option(help="Held-out rows; without it a part of --data is held out.")] = None,
    ranks: Annotated[str, typer.Option(help="Ranks to try, with commas.")] = "1,2,4,8",
    targets: Annotated[
        list[str] | None, typer.Option(help="What to adapt, with commas; give it several times.")
    ] = None,
    alpha: Alpha = 16.0,
    layers: Layers = "all",
    scaling: Scaling = "alpha/r",
    init: Init = "gaussian",
    full: Full = "",
    objective: Annotated[str, typer.Option(help="lm or classify; auto: what the rows and model ask for.")] = "auto",
    steps: Annotated[int, typer.Option(help="Optimiser steps of each.")] = 60,
    batch_size: Annotated[int, typer.Option(help="Rows in a step of each.")] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Draws A, the order of the rows, and what is held out.")] = 0,
    eval_rows: Annotated[int, typer.Option(help="Held-out rows that the loss is measured on.")] = 64,
    engine: Annotated[str, typer.Option(help="local: together, here; ray: each alone, on a Ray cluster.")] = "local",
    dtype: Dtype = "auto",
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="Write the adapters here, a folder for each.")] = None,
    json: Json = False,
) -> Result:
    """Train every rank with every choice of matrices. All of them share one model, and see the same rows."""
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    specs = settings(ranks, targets or ["q,v"], alpha, layers, scaling, init, full)
    from lora_core import TrainConfig, load_data, load_task
    from lora_core.models import kind_of

    if (task is None) == (data is None):
        raise UserError("give either --task or --data" if task is None else "--task and --data are both given; one is")
    rows = load_data(data, test=test, seed=seed) if data else load_task(str(task), seed=seed)
    config = TrainConfig(steps=steps, batch_size=batch_size, lr=lr, seed=seed, eval_rows=eval_rows, eval_every=steps,
                         dtype=dtype, device=device)  # fmt: skip
    goal = None if objective == "auto" else objective
    classify = goal == "classify" or (goal is None and kind_of(model) == "encoder")
    found = _ray(model, specs, rows, config, classify, out) if engine == "ray" else _local(
        model, specs, rows, config, classify, out)  # fmt: skip
    runs = [found[name] for name in specs]
    cells = [("matrices", "rank", "numbers", "held-out loss", "before", "time")]
    for r in runs:
        cells.append((",".join(r["targets"]), str(r["rank"]), f"{r['trainable']:,}", number(r["loss_after"]),
                      number(r["loss_before"]), duration(r["train_s"])))  # fmt: skip
    value = {"runs": runs, "model": model, "task": rows.name, "steps": steps, "engine": engine}
    return Result(value=value, text=table(cells, right=(1, 2, 3, 4, 5)), json=json)


def settings(ranks: str, targets: list[str], alpha: float, layers: str, scaling: str, init: str,
             full: str) -> dict[str, LoraSpec]:  # fmt: skip
    """{name: spec} of every rank with every choice of matrices; UserError for a rank that is no number."""
    numbers = []
    for text in ranks.split(","):
        if not text.strip().isdigit():
            raise UserError(f"ranks are whole numbers with commas, such as 1,2,4,8; given {ranks!r}")
        numbers.append(int(text))
    specs = {}
    for chosen, rank in itertools.product(dict.fromkeys(targets), dict.fromkeys(numbers)):
        name = re.sub(r"[^\w-]", "-", f"{chosen.replace(',', '-')}-r{rank}")[:100]
        specs[name] = spec_of(chosen, rank, alpha, layers, scaling, init, 0.0, full=full)
    return specs


def _load(model: str, rows: Task, config: TrainConfig, classify: bool) -> tuple[Any, Any, tuple[str, ...], Any]:
    """(model, tokenizer, modules of a classifier that were drawn at random, what is saved beside an adapter)."""
    import lora_core as lc
    from lora_core.classification import drawn_modules

    labels = lc.labels_of(rows) if classify else None
    base, tokenizer = lc.load_model(model, device=config.device, dtype=config.dtype, labels=labels)
    info: dict[str, Any] = {"model": model, "task": rows.name, "template": rows.template}
    info |= {"objective": "classify", "labels": list(labels)} if labels else {"objective": "lm"}
    return base, tokenizer, drawn_modules(base) if labels else (), info


def _with(spec: LoraSpec, drawn: tuple[str, ...]) -> LoraSpec:
    return dataclasses.replace(spec, full=tuple(dict.fromkeys([*spec.full, *drawn])))


def _row(spec: LoraSpec, trainable: int, before: float | None, last: TrainEvent, folder: Path | None) -> dict[str, Any]:
    return {"targets": list(spec.targets), "rank": spec.rank, "alpha": spec.alpha, "trainable": trainable,
            "loss_before": before, "loss_after": last.held_loss, "reason": last.reason, "train_s": last.train_s,
            "tokens": last.tokens, "adapter": str(folder) if folder else None}  # fmt: skip


def _local(model: str, specs: Mapping[str, LoraSpec], rows: Task, config: TrainConfig, classify: bool,
           out: Path | None) -> dict[str, dict[str, Any]]:  # fmt: skip
    from tqdm import tqdm

    import lora_core as lc

    base, tokenizer, drawn, info = _load(model, rows, config, classify)
    specs = {n: _with(s, drawn) for n, s in specs.items()}
    before: dict[str, float | None] = {}
    found = {}
    with tqdm(total=config.steps * len(specs), unit="step", file=sys.stderr, leave=False) as bar:
        for e in lc.sweep(base, specs, rows, config, tokenizer=tokenizer, objective=info["objective"]):
            if e.event.kind == "base":
                before[e.name] = e.event.loss
            elif e.event.kind == "step":
                bar.update()
                bar.set_postfix_str(f"{e.name} {e.event.loss:.3f}")
            elif e.event.kind == "end":
                a = lc.get_adapter(base, e.name)
                folder = a.save(out / e.name, info) if out else None
                n = sum(p.numel() for p in a.parameters())
                found[e.name] = {"name": e.name, **_row(specs[e.name], n, before[e.name], e.event, folder)}
    return found


def _ray(model: str, specs: Mapping[str, LoraSpec], rows: Task, config: TrainConfig, classify: bool,
         out: Path | None) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Each setting as a task of its own, wherever Ray has a processor for it; RAY_ADDRESS names the cluster."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("--engine ray needs Ray: pip install 'lora-lab[cluster]'") from None
    ray.init(ignore_reinit_error=True, log_to_driver=False, configure_logging=False, include_dashboard=False)

    @ray.remote
    def one(name: str, spec: LoraSpec) -> dict[str, Any]:
        import lora_core as lc

        base, tokenizer, drawn, info = _load(model, rows, config, classify)
        a = lc.attach(base, _with(spec, drawn), name, seed=config.seed)
        events = list(lc.train(a, rows, config, tokenizer=tokenizer, objective=info["objective"]))
        folder = a.save(out / name, info) if out else None
        n = sum(p.numel() for p in a.parameters())
        return {"name": name, **_row(spec, n, events[0].loss, events[-1], folder)}

    try:
        return {r["name"]: r for r in ray.get([one.remote(n, s) for n, s in specs.items()])}
    finally:
        ray.shutdown()
