"""What is whose: the one place that decides what a visitor reads, changes, takes along and begins.

The host and the presenter may do everything. A participant reads their own runs, those shared with the room and the
recorded one; changes, stops and takes along their own; and keeps uploads in a folder of their own, by which nobody
else can ask for them. The model in memory is the presenter's choice, and so are the experiments.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.pages.visitor import asking
from app.runs.rows import Wanted
from app.runs.run import Run, RunRequest
from lora_core.errors import UserError

if TYPE_CHECKING:
    from app.runs.store import RunStore

PEOPLE = "people"  # below LoRA Lab's home: one folder a participant
MOST_LIVE, MOST_RUNS = 3, 60  # runs of one participant that wait or are trained, and that are kept
# what a participant's training may be, so that the others' turn comes
MOST = {"steps": 300, "batch_size": 16, "accumulate": 4, "max_tokens": 256, "eval_rows": 64}


@dataclass(frozen=True, kw_only=True)
class Quota:
    """How much one person may have lying here: uploads and their bytes; opened adapters, bytes of one and of all."""

    files: int
    bytes: int
    sets: int
    set_bytes: int
    all_sets: int


ALL_BYTES = 8 << 30  # of all participants' files together
FREE_BYTES = 1 << 30  # of the disk, which are left to the runs
MINE = Quota(files=50, bytes=512 << 20, sets=20, set_bytes=2 << 30, all_sets=6 << 30)
THEIRS = Quota(files=10, bytes=64 << 20, sets=4, set_bytes=128 << 20, all_sets=128 << 20)


_people = {"bytes": 0}  # of all participants, as the sweeper counted them last


def crowd(bytes: int) -> None:
    """Note how much all participants have lying here."""
    _people["bytes"] = bytes


def room_for_all(home: Path) -> None:
    """UserError for a participant where all of them fill what is set aside, or the disk would be full."""
    if asking.get().sees_all:
        return
    if _people["bytes"] > ALL_BYTES or shutil.disk_usage(home).free < FREE_BYTES:
        raise UserError("there is no room for more files here; the presenter can make some")


def owner() -> str:
    """Whose what is made now will be."""
    return asking.get().owner


def quota() -> Quota:
    return MINE if asking.get().sees_all else THEIRS


def folder(home: Path) -> Path:
    """Where the visitor's uploads are, below LoRA Lab's home."""
    return home if asking.get().sees_all else home / PEOPLE / asking.get().owner


def folders(home: Path) -> list[Path]:
    """The same of everybody, for whoever clears up."""
    return [home, *(p for p in home.glob(f"{PEOPLE}/*") if p.is_dir())]


def page(name: Any) -> str:
    """A page's own name, as far as other people's pages are concerned: nobody ends another one's question by it."""
    own = str(name or "")[:40]
    return own if asking.get().sees_all else f"{asking.get().owner}/{own}"


# ---- runs
def reads(run: Run) -> bool:
    return run.recorded or run.shared or asking.get().may_see(run.owner)


def seen(run: Run) -> Run:
    """A run as the visitor may see it: of somebody else's, not what their file is called. UserError where it is not
    theirs to see, in the words for one that is not there."""
    if not reads(run):
        raise missing(run.id)
    if run.request.data is None or asking.get().may_see(run.owner):
        return run
    hidden = {k: f"file-of-run-{run.id}{Path(v).suffix.lower()}" for k in ("data", "test")
              if (v := getattr(run.request, k))}  # fmt: skip
    error = "it did not end well" if run.error else None
    return replace(run, request=RunRequest.stored(run.request.to_dict() | hidden), error=error)


def found(store: RunStore, id: int) -> Run:
    """`seen` of a number; one that is not there is told like one that is somebody else's."""
    try:
        return seen(store.get(id))
    except UserError:
        if asking.get().sees_all:
            raise
        raise missing(id) from None


def missing(id: Any) -> UserError:
    return UserError(f"no run '{str(id)[:40]}' that you may see; yours are in the list, and those that are shared")


def listed(store: RunStore, limit: int, **more: Any) -> list[Run]:
    """The newest runs that the visitor may see; more: as for `RunStore.list`."""
    return [seen(r) for r in store.list(limit, **_whose(), **more)]


def count(store: RunStore, **more: Any) -> int:
    """How many runs there are that the visitor may see; more: as for `Wanted`."""
    return store.count(Wanted(**_whose(), **more))


def _whose() -> dict[str, Any]:
    who = asking.get()
    return {} if who.sees_all else {"owner": who.owner, "shared": True}


def own(run: Run) -> Run:
    """A run that the visitor may change. UserError for somebody else's."""
    if not asking.get().may_see(run.owner):
        raise UserError(f"run {run.id} is not yours: you can look at it, and nothing else")
    return run


def taken(run: Run) -> Run:
    """A run that the visitor may take along: their own, or the recorded one."""
    return run if run.recorded else own(run)


def rows(run: Run) -> Run:
    """A run whose rows the visitor may read: of a file only its owner. UserError for the others."""
    if run.request.data is not None and not asking.get().may_see(run.owner):
        raise UserError(f"run {run.id} was trained on somebody's own file, and only they may read its rows")
    return run


# ---- what is begun
def only_host(what: str) -> None:
    """UserError for a participant."""
    if not asking.get().sees_all:
        raise UserError(f"{what}: that is the presenter's to do")


def may_begin(store: RunStore, config: Mapping[str, Any] | None = None) -> None:
    """UserError where a participant has enough runs, or asks for a training that is too long for a room."""
    who = asking.get()
    if who.sees_all:
        return
    modest(config or {})
    if len(store.list(MOST_LIVE, status=("queued", "running"), owner=who.owner)) >= MOST_LIVE:
        raise UserError(f"{MOST_LIVE} runs of yours wait or are being trained; wait for one of them, or stop one")
    may_keep(store)


def modest(config: Mapping[str, Any]) -> None:
    """UserError for a participant's training, or a step of one, that takes more than a room's share."""
    for name, most in MOST.items():
        value = config.get(name)
        if not asking.get().sees_all and isinstance(value, (int, float)) and value > most:
            raise UserError(f"{name} is {value}; in a room it is at most {most}")


def may_keep(store: RunStore) -> None:
    """UserError where a participant has as many runs as are kept of one."""
    who = asking.get()
    if not who.sees_all and len(store.list(MOST_RUNS, owner=who.owner)) >= MOST_RUNS:
        raise UserError(f"you have {MOST_RUNS} runs; no more are kept of one person")


def usual(name: str, there: str | None) -> str:
    """The model that a page begins with: a participant's is the one that is there."""
    return name if asking.get().sees_all or there is None else there


def may_load(name: str, loaded: Iterable[str]) -> None:
    """UserError for a participant who asks for another model than the one that is there, by all of its names."""
    here = list(loaded)
    if not asking.get().sees_all and name not in here:
        there = f"here it is {here[0]}" if here else "none is there yet"
        raise UserError(f"model {name[:60]!r}: in a room the presenter chooses the model, and {there}")


def may_name(base: str | None) -> str | None:
    """The base model that a stranger's file names, if it is one of those known here: never a path of this machine."""
    from lora_core.models import registry

    known = {n.casefold() for m in registry() for n in (m.name, m.hub_id) if n}
    return base if base is None or asking.get().sees_all or base.casefold() in known else None
