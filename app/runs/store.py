"""The run store: one line a run in SQLite, one folder a run beside it. Many processes may use it at once.

A folder (`runs/000014/`) holds request.json, the user's data if there is any, events.jsonl, adapter/, log.txt, the
checkpoint while there is one, and the worker's lock, heartbeat and stop file. Its name is the run's number, which the
store gives out; no text from outside becomes a path.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import apsw

from app.runs import events as event_files
from app.runs.database import Database
from app.runs.folder import ADAPTER, copy_data, of_dead_processes
from app.runs.process import STOP, heartbeat_age, held, identity
from app.runs.recorded import RECORDED, recorded_run
from app.runs.rows import COLUMNS, Wanted, page, run_of
from app.runs.run import ENDED, RESUMABLE, Run, RunRequest, Status
from lora_core.errors import UserError, unknown
from lora_core.home import home as lab_home
from lora_core.home import sync_folder, write_json, writing

DATABASE, BALLAST = "runs.sqlite3", "ballast"
BALLAST_BYTES = 1 << 18  # let go when the disk is full, so that the end of a run can still be written down

T = TypeVar("T")


class RunStore:
    """The runs under one folder. May be shared by threads, but not carried through a fork.

    home      LoRA Lab's folder (None: `lora_core.home.home()`); the store is its folder "runs"
    recorded  the folder of the run that comes with LoRA Lab; it is run 0
    """

    def __init__(self, home: Path | str | None = None, *, recorded: Path = RECORDED) -> None:
        self.root = (Path(home) if home is not None else lab_home()).absolute() / "runs"
        self.path = self.root / DATABASE
        self.recorded_folder = recorded
        self.db = Database(self.path)
        self.reader = event_files.EventReader()
        self.keep_ballast()

    def close(self) -> None:
        self.db.close()

    # ---- reading
    def get(self, id: int) -> Run:
        """One run; UserError when there is none of that number."""
        if id == 0 and (recorded := self.recorded()):
            return recorded
        rows = self.db.rows(f"SELECT {COLUMNS} FROM runs WHERE id = ?", (_number(id),))
        if not rows:
            known = [str(r[0]) for r in self.db.rows("SELECT id FROM runs ORDER BY id DESC LIMIT 10", ())]
            raise unknown("run", str(id), known, "in this store")
        return self._run(rows[0])

    def list(self, limit: int = 100, offset: int = 0, status: Sequence[Status] = (), *, model: str | None = None,
             text: str = "", owner: str | None = None, shared: bool = False) -> list[Run]:  # fmt: skip
        """The newest runs first, of those that `Wanted` describes. Raises UserError for what cannot be asked for."""
        where, values = Wanted(status=status, model=model, text=text, owner=owner, shared=shared).where()
        sql = f"SELECT {COLUMNS} FROM runs {where} ORDER BY id DESC LIMIT ? OFFSET ?"
        return [self._run(r) for r in self.db.rows(sql, (*values, *page(limit, offset)))]

    def count(self, wanted: Wanted | None = None) -> int:
        """How many runs there are, of those wanted."""
        where, values = (wanted or Wanted()).where()
        return int(self.db.rows(f"SELECT count(*) FROM runs {where}", values)[0][0])

    def waiting(self) -> list[Run]:
        """The runs in the queue, the next one first."""
        sql = f"SELECT {COLUMNS} FROM runs WHERE status = 'queued' AND queued IS NOT NULL ORDER BY queued, id"
        return [self._run(r) for r in self.db.rows(sql, ())]

    def recorded(self) -> Run | None:
        """The run that comes with LoRA Lab, or None when it is not there."""
        return recorded_run(self.recorded_folder)

    def events(self, id: int, since: int = 0) -> list[dict[str, Any]]:
        """A run's events in order, from number `since` on (how many the caller has). Reads only what is new.

        When `Run.attempts` has grown, the events begin anew (those after the checkpoint are gone): ask from 0 again.
        """
        if id == 0 and (recorded := self.recorded()):
            return self.reader.read(recorded.folder / event_files.NAME, since)
        rows = self.db.rows("SELECT attempts FROM runs WHERE id = ?", (_number(id),))
        if not rows:
            self.get(id)  # says that there is none
        return self.reader.read(self.folder(id) / event_files.NAME, since, int(rows[0][0]))

    def heartbeat_age(self, id: int) -> float | None:
        """Seconds since the worker last showed that it lives; None before the first time."""
        return heartbeat_age(self.folder(id))

    def folder(self, id: int) -> Path:
        return self.root / f"{_number(id):06d}"

    # ---- making and deleting
    def create(self, request: RunRequest, *, queue: bool = False, owner: str = "") -> Run:
        """Write a new run down, with copies of its data files. It is trained when the queue or `run_here` takes it.

        owner: whose it is, "" for whoever the machine belongs to.

        Raises UserError when a data file cannot be read or the disk is full; then nothing is left behind.
        """
        model = Path(request.model).expanduser()
        if model.is_dir() and model.name != request.model:  # a folder: the worker's current one is another
            request = replace(request, model=str(model.absolute()))
        new = self.root / f".new-{secrets.token_hex(8)}"
        with writing(self.root), self.db.told():
            try:
                new.mkdir(mode=0o700, parents=True)  # the store too, if somebody has deleted it
                for name, given in (("data", request.data), ("test", request.test)):
                    if given is not None:
                        copy_data(Path(given), new, name)
                write_json(new / "request.json", request.to_dict())
                now = time.time()
                with self.db.transaction(sure=True):
                    queued = self._last(now) if queue else None
                    steps = request.config.get("steps", 0)
                    id = self._enter(new, request, {"created": now, "queued": queued, "steps": steps, "owner": owner})
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise
        return self.get(id)

    def adopt(self, folder: Path, request: RunRequest, values: Mapping[str, Any]) -> Run:
        """Enter a run that was trained elsewhere and is over; its folder, made in the store's, gets its number.

        values: the columns of its row, checked by the caller
        """
        ready = {k: json.dumps(v) if isinstance(v, dict) else v for k, v in values.items()}
        with writing(self.root), self.db.told(), self.db.transaction(sure=True):
            id = self._enter(folder, request, ready)
        return self.get(id)

    def _enter(self, folder: Path, request: RunRequest, values: Mapping[str, Any]) -> int:
        """Within a transaction: a row and the folder's name, of which a power cut leaves both or none."""
        row = {"request": json.dumps(request.to_dict()), **values}
        sql = f"INSERT INTO runs ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})"
        self.db.execute(sql, tuple(row.values()))
        id = self.db.connection.last_insert_rowid()
        if self.folder(id).exists():  # left by a database that was lost: those numbers are taken
            taken = max(int(p.name) for p in self.root.iterdir() if p.name.isdigit())
            self.db.execute("UPDATE runs SET id = ? WHERE id = ?", (taken + 1, id))
            self.db.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'runs'", (taken + 1,))
            id = taken + 1
        os.rename(folder, self.folder(id))
        sync_folder(self.root)
        return id

    def share(self, id: int, shared: bool = True) -> Run:
        """Let everybody in the room read a run, or its owner alone again."""
        run = self.get(id)
        if not run.recorded:
            with self.db.told(), self.db.transaction():
                self.db.execute("UPDATE runs SET shared = ? WHERE id = ?", (int(shared), run.id))
        return self.get(id)

    def delete(self, id: int) -> None:
        """Delete a run with its folder. UserError for one that is being trained, and for the recorded one."""
        run = self.get(id)
        if run.recorded:
            raise UserError("the recorded run comes with LoRA Lab and cannot be deleted")
        if run.status == "running" or held(run.folder):
            raise UserError(f"run {id} is being trained; stop it before deleting it")
        with self.db.told(), self.db.transaction():
            if not self.db.execute("DELETE FROM runs WHERE id = ? AND status != 'running'", (id,)):
                raise UserError(f"run {id} is being trained; stop it before deleting it")
        gone = self.root / f".gone-{secrets.token_hex(8)}"
        with suppress(OSError):
            os.rename(run.folder, gone)
        shutil.rmtree(gone, ignore_errors=True)
        self.reader.forget(run.folder / event_files.NAME)

    def sweep(self, older_s: float = 3600) -> int:
        """Remove what a killed process left half-made, half-deleted or half-written; how many folders that were."""
        found = 0
        for path in [*self.root.glob(".new-*"), *self.root.glob(".gone-*")]:
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > older_s:
                    shutil.rmtree(path, ignore_errors=True)
                    found += 1
        home = self.root.parent
        for path in of_dead_processes([*home.glob(".*"), *home.glob("*/.*")]):
            with suppress(OSError):
                path.unlink()
        return found

    # ---- the queue's side
    def enqueue(self, id: int) -> Run:
        """Put a run into the queue: a new one, or one that ended before its last step and can go on."""
        run = self.get(id)
        self.may_start(run)
        with self.db.told(), self.db.transaction():
            self.db.execute(
                "UPDATE runs SET status = 'queued', queued = ?, ended = NULL, error = NULL WHERE id = ? AND "
                "(status = 'queued' AND queued IS NULL OR status IN ('interrupted', 'stopped', 'failed'))",
                (self._last(time.time()), id),
            )
        return self.get(id)

    def _last(self, now: float) -> float:
        """A time behind those of all that wait, so that a clock set back lets nobody overtake."""
        behind = self.db.rows("SELECT max(queued) FROM runs WHERE status = 'queued'")[0][0]
        return now if behind is None else max(now, behind + 1e-3)

    def ask_to_stop(self, id: int) -> Run:
        """A waiting run leaves the queue; a running one is asked to end after its step, and keeps its adapter."""
        with self.db.told(), self.db.transaction():
            self.db.execute(
                "UPDATE runs SET status = 'stopped', ended = ?, queued = NULL WHERE id = ? AND status = 'queued'",
                (time.time(), _number(id)),
            )
        run = self.get(id)
        if run.status == "running":
            try:
                (run.folder / STOP).touch()
            except OSError:  # no room for a file: a signal needs none
                if run.pid is None or identity(run.pid) != run.process:
                    raise
                os.kill(run.pid, signal.SIGTERM)
        return run

    def settle(self, run: Run, status: Status, error: str | None) -> bool:
        """Write down how a run ended whose process is dead; False when somebody else was faster.

        A run that had saved its adapter and said "end" was over in all but name: that word counts.
        """
        events, adapter = self.events(run.id), (run.folder / ADAPTER).is_dir()
        last = next((e for e in reversed(events) if e.get("kind") == "end"), None)
        if adapter and last and last.get("reason") in ENDED:
            status, error = last["reason"], last.get("message") if last["reason"] == "diverged" else None
        elif not run.folder.is_dir():
            error = f"its folder {run.folder} is gone"

        def write() -> bool:
            with self.db.transaction(sure=True):
                changed = self.db.execute(
                    "UPDATE runs SET status = ?, error = ?, ended = ?, queued = NULL, adapter = ? "
                    "WHERE id = ? AND status = ? AND pid IS ? AND process IS ?",
                    (status, error, time.time(), adapter, run.id, run.status, run.pid, run.process),
                )
            return bool(changed)

        return self._even_on_a_full_disk(write)

    # ---- the worker's side: each of these counts only for the process that claimed the run
    def claim(self, id: int, *, resume: bool = False) -> Run | None:
        """Make this process the one that trains the run; None when it is not to be trained (any more)."""
        allowed = ("queued", *RESUMABLE) if resume else ("queued",)
        marks = ",".join("?" * len(allowed))
        pid = os.getpid()
        with self.db.told(), self.db.transaction():
            claimed = self.db.execute(
                f"UPDATE runs SET status = 'running', pid = ?, process = ?, started = ?, ended = NULL, error = NULL, "
                f"queued = NULL, attempts = attempts + 1 WHERE id = ? AND status IN ({marks})",
                (pid, identity(pid), time.time(), id, *allowed),
            )
        return self.get(id) if claimed else None

    def progress(self, id: int, **values: Any) -> None:
        """Note step, steps, base_loss or loss of the run that this process trains."""
        self._update(id, values, sure=False)

    def finish(self, id: int, status: Status, **values: Any) -> None:
        """Write down that this process's run is over; on the disk when this returns.

        values: error, score, result, adapter (bool), and those of `progress`. On a full disk the ballast makes room.
        """
        values |= {"status": status, "ended": time.time()}
        self._even_on_a_full_disk(lambda: self._update(id, values, sure=True))

    def _even_on_a_full_disk(self, write: Callable[[], T]) -> T:
        """Do it; where the disk is full, with the room that the ballast gives back."""
        try:
            return write()
        except (apsw.FullError, apsw.IOError, OSError):
            (self.root / BALLAST).unlink(missing_ok=True)
            with self.db.told():
                return write()

    def keep_ballast(self) -> None:
        """A file whose space can be given back to a full disk."""
        path = self.root / BALLAST
        with suppress(OSError):
            if not path.exists() or path.stat().st_size < BALLAST_BYTES:
                path.write_bytes(os.urandom(BALLAST_BYTES))

    # ---- inside
    def _update(self, id: int, values: Mapping[str, Any], sure: bool) -> None:
        pid = os.getpid()
        finite = {k: event_files.plain(v) for k, v in values.items()}
        ready = [json.dumps(v) if isinstance(v, dict) else v for v in finite.values()]
        names = ", ".join(f"{k} = ?" for k in finite)
        sql = f"UPDATE runs SET {names} WHERE id = ? AND status = 'running' AND pid = ? AND process IS ?"
        with self.db.transaction(sure=sure):
            if not self.db.execute(sql, (*ready, id, pid, identity(pid))):
                raise LostRun(f"run {id} is no longer this process's to train")

    def may_start(self, run: Run) -> None:
        """UserError that says why a run cannot be trained (further), when it cannot."""
        why = {
            "done": "has ended already",
            "diverged": "has diverged, and would again; start a new one with a smaller learning rate",
            "running": "is being trained already",
        }.get(run.status)
        if run.recorded:
            raise UserError("the recorded run comes with LoRA Lab and cannot be trained further")
        if why:
            raise UserError(f"run {run.id} {why}")
        if not run.folder.is_dir():
            raise UserError(f"the folder of run {run.id} is gone: it cannot go on; delete it, or train it anew")

    def _run(self, row: Sequence[Any]) -> Run:
        return run_of(row, self.root)


class LostRun(RuntimeError):
    """The store gave this run to somebody else, or it was deleted: the process that trains it must end."""


def _number(id: Any) -> int:
    if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < 2**53:
        raise UserError(f"{id!r} is no run; runs have numbers, such as 14")
    return id
