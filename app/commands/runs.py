"""`lora-lab runs …`: the run store that the page and the command line share."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.commands import run_files
from app.commands.output import Json, Result, duration, number, table
from app.commands.train import Out, follow, in_words, summary
from lora_core.errors import UserError

if TYPE_CHECKING:
    from app.runs.run import Run
    from app.runs.store import RunStore

cli = typer.Typer(
    help="The runs that are kept: list, show, resume, delete, export, import, gc.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
cli.command("export")(run_files.export)
cli.command("import")(run_files.import_)
cli.command("gc")(run_files.gc)
Number = Annotated[int, typer.Argument(metavar="RUN", help="A run's number.")]


@cli.command("list")
def list_(
    limit: Annotated[int, typer.Option(help="At most this many.")] = 20,
    offset: Annotated[int, typer.Option(help="Leave out the newest so many.")] = 0,
    status: Annotated[list[str] | None, typer.Option(help="Only these: done, running, interrupted, …")] = None,
    model: Annotated[str | None, typer.Option(help="Only runs of this model.")] = None,
    search: Annotated[str, typer.Option(help="Only runs with these words in title, data or settings.")] = "",
    json: Json = False,
) -> Result:
    """The kept runs, the newest first."""
    from app.runs.rows import Wanted

    wanted = Wanted(status=tuple(status or ()), model=model, text=search)  # type: ignore[arg-type]
    store = settled()
    found = store.list(limit, offset, wanted.status, model=model, text=search)
    result = listing(found, json)
    total = store.count(wanted)
    more = {"total": total, "limit": limit, "offset": offset}
    if found and offset + len(found) < total or not found and total:
        last = offset + len(found)
        result = replace(result, text=f"{result.text}\n\n{offset + 1 if found else 0} to {last} of {total:,}")
    if not found and (status or model or search):
        result = replace(result, text="no such run")
    return replace(result, value=result.value | more)


def settled() -> RunStore:
    """The store, with the runs whose process is dead marked as such."""
    import apsw

    from app.runs.queue import settle_dead
    from app.runs.store import RunStore

    store = RunStore()
    with suppress(UserError, apsw.Error, OSError):  # a full disk is no reason to show nothing
        settle_dead(store)
    return store


@cli.command()
def show(run: Number, events: Annotated[bool, typer.Option(help="With all that happened, step by step.")] = False,
         json: Json = False) -> Result:  # fmt: skip
    """One run: what was asked for, how it went, where it is."""
    from app.runs.run import command_line

    store = settled()
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
def resume(
    run: Number,
    anyway: Annotated[bool, typer.Option("--anyway", help="Also where the free memory will not do.")] = False,
    out: Out = None,
    json: Json = False,
) -> Result:
    """Go on with a run that was stopped, interrupted or failed, from its last checkpoint."""
    from lora_core.home import writing

    store = settled()
    found = store.get(run)
    if out is not None:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
    result = follow(store, found, out, json, fresh=False, anyway=anyway)
    return replace(result, value=result.value | {"runs": [store.get(run).to_dict()]})


@cli.command()
def delete(run: Number, json: Json = False) -> Result:
    """Delete a run with its adapter and its curve."""
    store = settled()
    store.delete(run)
    left = [r.to_dict() for r in store.list(20)]
    return Result(value={"deleted": run, "runs": left}, text=f"run {run} is deleted", json=json)


def listing(runs: list[Run], json: bool) -> Result:
    from app.runs.process import SILENT_S, heartbeat_age
    from app.runs.run import describe

    rows = [("run", "status", "model", "trained on", "adapter", "steps", "loss", "when")]
    for r in runs:
        age = heartbeat_age(r.folder) if r.status == "running" else None
        status = f"{r.status}, silent for {duration(age)}" if age is not None and age > SILENT_S else r.status
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(r.created))
        loss = f"{number(r.base_loss, 2)} -> {number(r.loss, 2)}"
        what = (r.request.model, r.request.data_name, describe(r))
        rows.append((str(r.id), status, *what, f"{r.step}/{r.steps}", loss, when))
    text = table(rows, right=(0,)) if runs else "no runs yet; `lora-lab train` or the page makes one"
    return Result(value={"runs": [r.to_dict() for r in runs]}, text=text, json=json)
