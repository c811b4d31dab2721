"""`lora-lab runs …`: the run store that the page and the command line share."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.commands.output import Json, Result, number, table
from app.commands.train import Out, follow, in_words, summary
from lora_core.errors import UserError

if TYPE_CHECKING:
    from app.runs.run import Run

cli = typer.Typer(
    help="The runs that are kept: list, show, resume, delete.", no_args_is_help=True, rich_markup_mode=None
)
Number = Annotated[int, typer.Argument(metavar="RUN", help="A run's number.")]


@cli.command("list")
def list_(limit: Annotated[int, typer.Option(help="At most this many.")] = 20, json: Json = False) -> Result:
    """The kept runs, the newest first."""
    from app.runs.store import RunStore

    if limit < 1:
        raise UserError(f"limit is {limit}; it must be at least 1")
    return listing(RunStore().list(limit), json)


@cli.command()
def show(run: Number, events: Annotated[bool, typer.Option(help="With all that happened, step by step.")] = False,
         json: Json = False) -> Result:  # fmt: skip
    """One run: what was asked for, how it went, where it is."""
    from app.runs.run import command_line
    from app.runs.store import RunStore

    store = RunStore()
    found = store.get(run)
    value: dict[str, Any] = {"runs": [found.to_dict()]}
    if events:
        value["events"] = store.events(run)
    text = in_words(summary(found, found.adapter))
    if events:
        steps = [e for e in value["events"] if e.get("kind") in ("base", "step", "held")]
        losses = [e["loss"] if e["kind"] == "step" else None for e in steps]
        rows = [(str(e["step"]), number(x, 4), number(e.get("held_loss"), 4)) for e, x in zip(steps, losses)]
        text += "\n\n" + table([("step", "loss", "held-out"), *rows], right=(0, 1, 2))
    return Result(value=value, text=f"{text}\n\n{command_line(found.request)}", json=json)


@cli.command()
def resume(run: Number, out: Out = None, json: Json = False) -> Result:
    """Go on with a run that was stopped, interrupted or failed, from its last checkpoint."""
    from app.runs.store import RunStore
    from lora_core.home import writing

    store = RunStore()
    found = store.get(run)
    if out is not None:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
    result = follow(store, found, out, json, fresh=False)
    return replace(result, value=result.value | {"runs": [store.get(run).to_dict()]})


@cli.command()
def delete(run: Number, json: Json = False) -> Result:
    """Delete a run with its adapter and its curve."""
    from app.runs.store import RunStore

    store = RunStore()
    store.delete(run)
    left = [r.to_dict() for r in store.list(20)]
    return Result(value={"deleted": run, "runs": left}, text=f"run {run} is deleted", json=json)


def listing(runs: list[Run], json: bool) -> Result:
    from app.runs.run import describe

    rows = [("run", "status", "model", "trained on", "adapter", "steps", "loss", "when")]
    for r in runs:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(r.created))
        loss = f"{number(r.base_loss, 2)} -> {number(r.loss, 2)}"
        what = (r.request.model, r.request.data_name, describe(r))
        rows.append((str(r.id), r.status, *what, f"{r.step}/{r.steps}", loss, when))
    text = table(rows, right=(0,)) if runs else "no runs yet; `lora-lab train` or the page makes one"
    return Result(value={"runs": [r.to_dict() for r in runs]}, text=text, json=json)
