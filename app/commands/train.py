"""`lora-lab train`: a fine-tune in this process, kept in the run store like those of the page."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.commands.options import (
    Alpha,
    Bottleneck,
    Device,
    Dora,
    Dropout,
    Dtype,
    Full,
    Init,
    Layers,
    Mask,
    Method,
    Prefix,
    Rank,
    Scaling,
    Targets,
    TrainA,
    spec_of,
)
from app.commands.output import Json, Result, duration, number, say, table
from lora_core.errors import UserError

if TYPE_CHECKING:
    from app.runs.run import Run, RunRequest
    from app.runs.session import Session, Stop
    from app.runs.store import RunStore

Out = Annotated[Path | None, typer.Option(help="Also write the adapter here, in PEFT's format.")]


def train(
    model: Annotated[str, typer.Option(help="A model's name, folder or hub id.")] = "smollm2-135m",
    task: Annotated[str | None, typer.Option(help="A built-in task; `lora-lab train --task list` names them.")] = None,
    data: Annotated[Path | None, typer.Option(help="Or your own rows: .txt .tsv .csv .jsonl.")] = None,
    test: Annotated[Path | None, typer.Option(help="Held-out rows; without it a part of --data is held out.")] = None,
    objective: Annotated[str, typer.Option(help="lm, classify or preference; auto: what the rows and model ask for.")]
    = "auto",
    targets: Targets = "q,v",
    rank: Rank = 8,
    alpha: Alpha = 16.0,
    layers: Layers = "all",
    scaling: Scaling = "alpha/r",
    init: Init = "gaussian",
    train_A: TrainA = True,
    dora: Dora = False,
    mask: Mask = 0.0,
    full: Full = "",
    bottleneck: Bottleneck = 0,
    prefix: Prefix = 0,
    method: Method = "",
    dropout: Dropout = 0.0,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 60,
    batch_size: Annotated[int, typer.Option(help="Rows in a forward pass.")] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-3,
    lr_ratio: Annotated[float, typer.Option(help="The rate of B is this many times that of A (LoRA+).")] = 1.0,
    schedule: Annotated[str, typer.Option(help="linear or cosine to 0 after the warm-up, or constant.")] = "linear",
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the rate rises.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW, on matrices.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0 for none.")] = 1.0,
    accumulate: Annotated[int, typer.Option(help="Forward passes in a step.")] = 1,
    seed: Annotated[int, typer.Option(help="Draws A, the order of the rows, and what is held out.")] = 0,
    eval_rows: Annotated[int, typer.Option(help="Held-out rows that are measured on; 0: none.")] = 64,
    eval_every: Annotated[int, typer.Option(help="Steps between measurements; 0 for three in a run.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="Longer rows are cut.")] = 256,
    norms_every: Annotated[int, typer.Option(hidden=True)] = 2,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 10,
    beta: Annotated[float, typer.Option(help="Of a preference: how dear it is to move away from the base.")] = 0.1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    template: Annotated[str | None, typer.Option(help="What is put before a completion; '{prompt} ->'.")] = None,
    title: Annotated[str | None, typer.Option(help="A name for the run.")] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Also where the free memory will not do.")] = False,
    out: Out = None,
    json: Json = False,
) -> Result:
    """Fine-tune: an adapter in PEFT's format. Ctrl-C ends it after the current step and keeps the adapter."""
    spec = spec_of(targets, rank, alpha, layers, scaling, init, dropout, train_A, dora, mask, full, bottleneck,
                   prefix, method)  # fmt: skip
    if task == "list":
        return tasks(json)
    from app.runs.run import RunRequest
    from lora_core.home import home, writing

    files = {"data": str(data.expanduser()) if data else None, "test": str(test.expanduser()) if test else None}
    request: dict[str, Any] = {"model": model, "task": task, "template": template, "title": title, **files}
    request |= {"spec": spec.to_dict(), "objective": None if objective == "auto" else objective}
    RunRequest(**request)  # what can be known without torch is told before it is loaded
    home()
    if out is not None:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
    if data is not None:
        from lora_core.tasks import load_data

        load_data(data, test=test, seed=max(0, seed), template=template)  # told by its own name, before a copy is kept
    from lora_core import TrainConfig

    options: dict[str, Any] = {"schedule": schedule}
    config = TrainConfig(steps=steps, batch_size=batch_size, lr=lr, lr_ratio=lr_ratio, warmup=warmup, clip=clip,
                         weight_decay=weight_decay, accumulate=accumulate, seed=seed, eval_rows=eval_rows,
                         eval_every=eval_every, max_tokens=max_tokens, norms_every=norms_every,
                         checkpoint_every=checkpoint_every, beta=beta, dtype=dtype, device=device,
                         **options)  # fmt: skip
    from app.runs.store import RunStore

    store = RunStore()
    run = store.create(RunRequest(**request, config=config.to_dict()))
    return follow(store, run, out, json, fresh=True, anyway=anyway)


def tasks(json: bool) -> Result:
    """The built-in tasks."""
    from lora_core.tasks import task_names

    rows = list(task_names())
    value = {"tasks": [{"name": n, "about": about} for n, about in rows]}
    return Result(value=value, text=table([("task", ""), *rows]), json=json)


def follow(
    store: RunStore, run: Run, out: Path | None, json: bool, *, fresh: bool, anyway: bool = False
) -> Result:
    """Train a run here with a progress bar; the result that `train` and `runs resume` print.

    fresh: the run was made for this: when the input turns out to be wrong before its first step, it is not kept.
    anyway: also where the memory that is free will not do
    """
    from app.pages.words import training
    from app.runs.worker import run_here

    watch = Watch(anyway)
    run = run_here(store, run.id, watch.event, session=watch.open)
    watch.close()
    if watch.refused is not None:
        if fresh and not run.step:
            store.delete(run.id)
        raise watch.refused
    if out is not None and run.adapter is not None:
        copy_adapter(run.adapter, out)
    if happened := training(run):
        say(happened)
    value = summary(run, out if out is not None and run.adapter else run.adapter)
    status = {"done": 0, "stopped": 0, "interrupted": 130}.get(run.status, 1)
    if run.error and run.status != "interrupted":
        say(f"lora-lab: {run.error}")
    if run.status == "interrupted":
        say(f"interrupted after step {run.step} of {run.steps}; `lora-lab runs resume {run.id}` goes on")
    return Result(value=value, text=in_words(value), json=json, status=status)


class Watch:
    """Shows a training on standard error, and remembers a UserError that came out of it."""

    def __init__(self, anyway: bool = False) -> None:
        self.anyway = anyway
        self.refused: UserError | None = None
        self.bar: Any = None

    def open(self, request: RunRequest, folder: Path) -> Session:
        """A session that says, before it trains, what will be trained and how long that takes."""
        from app.runs.session import open_session

        try:
            session = open_session(request, folder, self.anyway)
            self.foretell(session, request)
        except UserError as error:
            self.refused = error
            raise
        return _Watched(session, self)

    def foretell(self, session: Any, request: RunRequest) -> None:
        from app.runs.run import describe
        from lora_core.estimate import estimate
        from lora_core.machine import fingerprint

        for note in session.task.notes:
            say(with_own_names(note, request))
        facts = session.facts()
        say(f"{request.model} on {request.data_name}: {describe(request)}, {facts['trainable']:,} numbers to train")
        e = estimate(session.model, session.adapter.spec, session.task, session.config, objective=session.objective)
        where = fingerprint()
        place = f"{where['chip']}, {where['threads']} threads" if facts["device"] == "cpu" else facts["device"]
        say(f"about {duration(e.total_s)} on this machine ({place}, {facts['dtype']})")

    def event(self, event: Mapping[str, Any]) -> None:
        """What `run_here` tells; a bar with loss and time left."""
        from tqdm import tqdm

        kind = event["kind"]
        if kind == "base" and event.get("held_loss") is not None:
            self.write(f"held-out loss of the base model: {event['held_loss']:.3f}")
        if kind == "held":
            self.write(f"held-out loss after step {event['step']}: {event['held_loss']:.3f}")
        if kind == "step":
            if self.bar is None:
                self.bar = tqdm(total=event["steps"], initial=event["step"] - 1, unit="step", file=sys.stderr,
                                mininterval=0.1 if sys.stderr.isatty() else 5.0, bar_format=FORMAT)  # fmt: skip
            left = event.get("left_s")
            speed = event.get("tokens_per_s")
            words = [f"loss {event['loss']:.3f}", f"{speed:.0f} tokens/s" if speed else "",
                     f"{duration(left)} left" if left else ""]  # fmt: skip
            self.bar.set_postfix_str(", ".join(w for w in words if w), refresh=False)
            self.bar.update(1)

    def write(self, text: str) -> None:
        if self.bar is not None:
            self.bar.clear()
        say(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


FORMAT = "{percentage:3.0f}%|{bar:30}| step {n_fmt}/{total_fmt}{postfix}"


class _Watched:
    """A session whose UserErrors are remembered: the run store keeps only their text."""

    def __init__(self, session: Session, watch: Watch) -> None:
        self.session, self.watch = session, watch

    def train(self, stop: Stop) -> Iterator[dict[str, Any]]:
        try:
            yield from self.session.train(stop)
        except UserError as error:
            self.watch.refused = error
            raise

    def save(self, folder: Path, info: Mapping[str, Any]) -> None:
        self.session.save(folder, info)

    def score(self, stop: Stop) -> dict[str, Any] | None:
        self.watch.write("scoring held-out rows")
        return self.session.score(stop)

    def effect(self, events: Sequence[Mapping[str, Any]], stop: Stop) -> dict[str, Any] | None:
        return self.session.effect(events, stop)

    def facts(self) -> dict[str, Any]:
        return self.session.facts()


def with_own_names(note: str, request: RunRequest) -> str:
    """A remark on the data, with the user's file names in place of those of the copies in the run's folder."""
    for name, given in (("data", request.data), ("test", request.test)):
        if given is not None:
            note = note.replace(f"{name}{Path(given).suffix.lower()}", Path(given).name)
    return note


def copy_adapter(adapter: Path, out: Path) -> None:
    """Copy an adapter's files to a folder, each whole before it takes its name."""
    from lora_core.home import write, writing

    with writing(out):
        for file in sorted(adapter.iterdir()):
            write(out / file.name, file.read_bytes())


def summary(run: Run, adapter: Path | None) -> dict[str, Any]:
    """What scripts get of a run that was trained here."""
    r = run.result
    seconds, tokens = r.get("train_s"), r.get("tokens")
    speed = tokens / seconds if tokens and seconds else None  # of the whole run; its events have that of the moment
    accuracy = {}
    if r.get("objective") == "classify":
        sides = (("before", "base"), ("after", "adapted"))
        accuracy = {f"accuracy_{when}": run.score[side]["accuracy"] if run.score else None for when, side in sides}
    return {"run": run.id, "status": run.status, "objective": r.get("objective"),
            "adapter": str(adapter) if adapter else None, "steps": run.step,
            "loss_before": run.base_loss, "loss_after": run.loss, "train_s": seconds, "tokens": tokens,
            "tokens_per_s": speed, **{k: r.get(k) for k in ("dtype", "device", "trainable", "peak_bytes")},
            **accuracy, "score": dict(run.score) if run.score else None, "effect": r.get("effect"),
            "error": run.error}  # fmt: skip


def in_words(value: Mapping[str, Any]) -> str:
    """The same for a person."""
    rows = [(f"run {value['run']}", f"{value['status']} after {value['steps']} steps")]
    if value["loss_after"] is not None:
        rows.append(("held-out loss", f"{number(value['loss_before'])} -> {number(value['loss_after'])}"))
    if (score := value["score"]) is not None:
        name = score["name"]
        rows.append((name, f"{number(score['base'].get(name))} -> {number(score['adapted'].get(name))}"))
    if (speed := value["tokens_per_s"]) is not None:
        where = f"{value['dtype']} on {value['device']}"
        rows.append(("training", f"{duration(value['train_s'])}, {speed:,.0f} tokens/s in {where}"))
    if value["adapter"]:
        rows.append(("adapter", value["adapter"]))
    return table(rows)
