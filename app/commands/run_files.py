"""`lora-lab runs export`, `import` and `gc`: runs as files, and room on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.commands.output import Json, Result, size, table

Numbers = Annotated[list[int], typer.Argument(metavar="RUN…", help="Numbers of runs that are over.")]


def export(
    runs: Numbers,
    out: Annotated[Path, typer.Option(help="The zip to write; one that is there is replaced.")],
    json: Json = False,
) -> Result:
    """Write runs to one zip: settings, curve, film, adapter, and the rows of your own that they were trained on."""
    from app.runs.archive import export_runs
    from app.runs.store import RunStore

    value = export_runs(RunStore(), runs, out.expanduser().absolute())
    count = len(value["runs"])
    text = f"{count} run{'s' if count > 1 else ''} in {value['file']}: {size(value['bytes'])}"
    return Result(value=value, text=text, json=json)


def import_(
    file: Annotated[Path, typer.Argument(help="A zip that `lora-lab runs export` wrote.")],
    json: Json = False,
) -> Result:
    """Take in the runs of such a zip, with new numbers. All is checked first: names, sizes, hashes, adapters."""
    from app.commands.runs import listing
    from app.runs.archive import import_runs
    from app.runs.store import RunStore

    return listing(import_runs(RunStore(), file.expanduser().absolute()), json)


def gc(
    older_than: Annotated[float | None, typer.Option(help="Days; of uploads (1 otherwise), and with --runs.")] = None,
    runs: Annotated[bool, typer.Option("--runs", help="Also delete runs that are over.")] = False,
    keep: Annotated[int | None, typer.Option(help="With --runs: the newest so many stay.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
    json: Json = False,
) -> Result:
    """Make room: half-written leftovers, checkpoints that are needed no more, old uploads. No runs without --runs."""
    from app.runs.gc import Asked, collect
    from app.runs.queue import settle_dead
    from app.runs.store import RunStore

    asked = Asked(runs=runs, older_days=older_than, keep=keep)
    store = RunStore()
    settle_dead(store)
    gone = collect(store, asked, dry=dry_run)
    total = sum(g.bytes for g in gone)
    rows = [("what", "run", "size", "where")]
    rows += [(g.what, str(g.run or ""), size(g.bytes), str(g.path)) for g in gone]
    said = f"{size(total)} {'would be' if dry_run else 'are'} free again" if gone else "nothing to remove"
    text = f"{table(rows, right=(1, 2))}\n\n{said}" if gone else said
    value = {"removed": [g.to_dict() for g in gone], "bytes": total, "dry_run": dry_run}
    return Result(value=value, text=text, json=json)
