"""Room again: what `lora-lab runs gc` removes, and what it leaves alone.

Without more words only what nobody can miss: half-written files of processes that died, folders of runs that were being
made or deleted, checkpoints of runs that will not go on, uploads, opened files and merged models of more than a day. A
run goes only where `Asked.runs` says so, and never one that waits or is being trained.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.runs.folder import CHECKPOINT, of_dead_processes, tidy
from app.runs.process import Lock
from app.runs.rows import MOST_LISTED
from app.runs.run import ENDED, Run
from app.runs.store import RunStore
from lora_core.errors import UserError
from lora_core.sealed import before, damaged

HOUR_S, DAY_S = 3600.0, 86_400.0
UPLOADS = ("uploads", "opened", "take")  # folders of the home whose entries can be given or made again


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What may go besides leftovers.

    runs        also runs that are over: those that ended more than `older_days` ago, but for the newest `keep`
    older_days  age of uploads and of runs in days; None: a day for uploads, any age for runs
    """

    runs: bool = False
    older_days: float | None = None
    keep: int | None = None

    def __post_init__(self) -> None:
        if self.older_days is not None and not 0 <= self.older_days < 1e6:
            raise UserError(f"older-than is {self.older_days}; it must be a number of days, 0 or more")
        if self.keep is not None and self.keep < 0:
            raise UserError(f"keep is {self.keep}; it must be 0 or more")
        if self.keep is not None and not self.runs:
            raise UserError("keep says how many runs stay; it goes with --runs, which lets the others go")
        if self.runs and self.keep is None and self.older_days is None:
            raise UserError("which runs? --older-than DAYS or --keep N says how many go; a single one is deleted with "
                            "`lora-lab runs delete`")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Gone:
    """One thing that was removed, or would be."""

    what: str
    path: Path
    bytes: int
    run: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"what": self.what, "path": str(self.path), "bytes": self.bytes, "run": self.run}


def collect(store: RunStore, asked: Asked, *, dry: bool = False) -> list[Gone]:
    """Remove it (not with `dry`) and say what it was. Safe beside a running server."""
    found = [*_leftovers(store), *_uploads(store.root.parent, asked)]
    runs: dict[int, Run] = {}
    while page := store.list(MOST_LISTED, offset=len(runs)):
        runs |= {r.id: r for r in page}
    going = {r.id for r in _runs(list(runs.values()), asked)} if asked.runs else set()
    for run in runs.values():
        if run.id in going:
            found.append(Gone(what="run", path=run.folder, bytes=size(run.folder), run=run.id))
        elif not run.live:
            found += _of_run(run)
    if not dry:
        found = [gone for gone in found if _remove(store, gone)]
    return found


def _runs(runs: list[Run], asked: Asked) -> Iterator[Run]:
    """The runs that go: over, old enough, and none of the newest."""
    over = [r for r in runs if r.status in ENDED]
    for run in over[asked.keep or 0 :]:
        age = time.time() - (run.ended or run.created)
        if asked.older_days is None or age > asked.older_days * DAY_S:
            yield run


def _leftovers(store: RunStore) -> Iterator[Gone]:
    """Of processes that died: in the store, and beside what LoRA Lab keeps of the machine."""
    known = {id for (id,) in store.db.rows("SELECT id FROM runs")}
    for path in sorted(store.root.iterdir()):
        if path.name.startswith((".new-", ".gone-")) and _age(path) > HOUR_S:
            yield Gone(what="left half-made", path=path, bytes=size(path))
        untouched = path.name.isdigit() and int(path.name) not in known and _age(path) > HOUR_S
        if untouched and {p.name for p in path.iterdir()} <= {"request.json"}:
            yield Gone(what="left half-made", path=path, bytes=size(path))
    home = store.root.parent
    for path in of_dead_processes(sorted([*home.glob(".*"), *home.glob("*/.*"), *home.glob("runs/*/.*")])):
        yield Gone(what="left half-written", path=path, bytes=size(path))


def _uploads(home: Path, asked: Asked) -> Iterator[Gone]:
    older_s = DAY_S if asked.older_days is None else asked.older_days * DAY_S
    for place in (home, *sorted(home.glob("people/*"))):
        for folder in UPLOADS:
            for path in sorted((place / folder).glob("*")):
                if _age(path) > older_s:
                    yield Gone(what="upload" if folder != "take" else "merged model", path=path, bytes=size(path))


def _of_run(run: Run) -> Iterator[Gone]:
    """What a run that is over needs no more. Those that can go on keep their checkpoints."""
    file = run.folder / CHECKPOINT
    for path in (file, before(file), damaged(file)):
        if path.is_file() and (run.status in ("done", "diverged") or path == damaged(file)):
            yield Gone(what="checkpoint", path=path, bytes=size(path), run=run.id)
    for path in (run.folder / ".adapter.new", run.folder / ".adapter.old"):
        if path.exists():
            yield Gone(what="left half-written", path=path, bytes=size(path), run=run.id)


def _remove(store: RunStore, gone: Gone) -> bool:
    """Whether it could be removed. What is in a run's folder goes with the run's lock alone."""
    if gone.what == "run" and gone.run is not None:
        try:
            store.delete(gone.run)
            return True
        except UserError:  # it goes on, or somebody deleted it meanwhile
            return False
    lock = Lock(gone.path.parent) if gone.run is not None else None
    try:
        if lock is not None and not lock.take(0):
            return False
        if lock is not None and gone.path.name.startswith(".adapter"):
            tidy(gone.path.parent)  # an old adapter may have to get its name back
        elif gone.path.is_dir() and not gone.path.is_symlink():
            shutil.rmtree(gone.path)
        else:
            gone.path.unlink()
        return True
    except OSError:
        return False
    finally:
        if lock is not None:
            lock.release()


def size(path: Path) -> int:
    """Bytes of a file, or of all that is in a folder."""
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    total = 0
    for file in files:
        with suppress(OSError):
            total += file.lstat().st_size if not file.is_dir() else 0
    return total


def _age(path: Path) -> float:
    try:
        return time.time() - path.lstat().st_mtime
    except OSError:
        return 0.0
