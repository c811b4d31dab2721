"""The run store's database: opened safely, brought up to date step by step, changed all or nothing.

`apsw` brings its own SQLite, because the system's may have the bug in WAL resets that damages a file with two writers
(fixed in 3.51.3). A migration, once released, never changes; a new one is added at the end.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw

from lora_core.errors import UserError
from lora_core.home import writing

APPLICATION = 0x4C6F5241  # "LoRA", so that nobody's other database is taken for a run store
BUSY_MS = 10_000

MIGRATIONS: tuple[str, ...] = (
    # 1: a run's request is its JSON text; `queued` is when it was put into the queue (NULL: it waits for nobody);
    # `process` tells the process `pid` from a later one of the same number; `adapter` is 1 once the folder is there.
    """
    CREATE TABLE runs (
        id        INTEGER PRIMARY KEY AUTOINCREMENT,
        status    TEXT    NOT NULL DEFAULT 'queued' CHECK (status IN
                  ('queued', 'running', 'done', 'stopped', 'diverged', 'failed', 'interrupted')),
        request   TEXT    NOT NULL,
        created   REAL    NOT NULL,
        queued    REAL,
        started   REAL,
        ended     REAL,
        attempts  INTEGER NOT NULL DEFAULT 0,
        step      INTEGER NOT NULL DEFAULT 0,
        steps     INTEGER NOT NULL DEFAULT 0,
        base_loss REAL,
        loss      REAL,
        score     TEXT,
        result    TEXT,
        error     TEXT,
        adapter   INTEGER NOT NULL DEFAULT 0,
        pid       INTEGER,
        process   TEXT
    ) STRICT;
    CREATE INDEX runs_live ON runs (status, queued) WHERE status IN ('queued', 'running');
    """,
    # 2: whose a run is ('': the machine's owner's), and whether everybody in the room may read it.
    """
    ALTER TABLE runs ADD COLUMN owner TEXT NOT NULL DEFAULT '';
    ALTER TABLE runs ADD COLUMN shared INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX runs_owner ON runs (owner, id);
    CREATE INDEX runs_shared ON runs (id) WHERE shared;
    """,
    # 3: what a search looks through: title, model, task or the data file's name, "q v r8"; kept by the database itself.
    """
    ALTER TABLE runs ADD COLUMN model TEXT NOT NULL DEFAULT '';
    ALTER TABLE runs ADD COLUMN words TEXT NOT NULL DEFAULT '';
    CREATE TRIGGER runs_words AFTER INSERT ON runs BEGIN
        UPDATE runs SET model = coalesce(request ->> '$.model', ''), words =
            coalesce(request ->> '$.title', '') || ' ' || coalesce(request ->> '$.model', '') || ' ' ||
            coalesce(request ->> '$.task', '') || ' ' ||
            replace(coalesce(request ->> '$.data', ''), rtrim(coalesce(request ->> '$.data', ''),
                replace(coalesce(request ->> '$.data', ''), '/', '')), '') || ' ' ||
            replace(replace(replace(coalesce(request -> '$.spec.targets', ''), '","', ' '), '["', ''), '"]', '') ||
            ' r' || coalesce(request ->> '$.spec.rank', '')
        WHERE id = NEW.id;
    END;
    UPDATE runs SET model = coalesce(request ->> '$.model', ''), words =
        coalesce(request ->> '$.title', '') || ' ' || coalesce(request ->> '$.model', '') || ' ' ||
        coalesce(request ->> '$.task', '') || ' ' ||
        replace(coalesce(request ->> '$.data', ''), rtrim(coalesce(request ->> '$.data', ''),
            replace(coalesce(request ->> '$.data', ''), '/', '')), '') || ' ' ||
        replace(replace(replace(coalesce(request -> '$.spec.targets', ''), '","', ' '), '["', ''), '"]', '') ||
        ' r' || coalesce(request ->> '$.spec.rank', '');
    CREATE INDEX runs_found ON runs (id, status, model, words, owner, shared);
    """,
)


class Database:
    """One connection that the threads of a process share; not to be carried through a fork.

    Where the file was deleted or put there anew, the connection goes over to the one that has the name now.
    """

    def __init__(self, path: Path, migrations: Sequence[str] = MIGRATIONS) -> None:
        self.path, self.migrations = path, migrations
        self.connection = open_database(path, migrations)
        self.file = file_of(path)
        self.lock = threading.RLock()

    def _look(self) -> None:
        """With the lock: open anew what is no longer the file of that name."""
        if file_of(self.path) != self.file and not self.connection.in_transaction:
            self.connection.close()
            self.connection = open_database(self.path, self.migrations)
            self.file = file_of(self.path)

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self.lock:
            self._look()
            return list(self.connection.execute(sql, values))

    def execute(self, sql: str, values: Sequence[Any] = ()) -> int:
        """Change something within a `transaction`; how many rows that were."""
        self.connection.execute(sql, values)
        return self.connection.changes()

    @contextmanager
    def transaction(self, sure: bool = False) -> Iterator[None]:
        """One change, all or nothing; with `sure` the disk has it before the block is left (else after a while)."""
        with self.lock:
            self._look()
            if sure:
                self.connection.execute("PRAGMA synchronous = FULL")
            try:
                self.connection.execute("BEGIN IMMEDIATE")
                try:
                    yield
                    self.connection.execute("COMMIT")
                except BaseException:
                    if self.connection.in_transaction:
                        self.connection.execute("ROLLBACK")
                    raise
            finally:
                if sure:
                    self.connection.execute("PRAGMA synchronous = NORMAL")

    @contextmanager
    def told(self) -> Iterator[None]:
        """Turns SQLite's errors about the disk and the file into UserErrors."""
        try:
            yield
        except apsw.Error as error:
            raise explained(error, self.path) from error

    def close(self) -> None:
        with self.lock:
            self.connection.close()


def file_of(path: Path) -> tuple[int, int] | None:
    """What tells a file from another one of the same name; None where there is none."""
    try:
        stat = os.stat(path)
        return stat.st_dev, stat.st_ino
    except OSError:
        return None


def open_database(path: Path, migrations: Sequence[str] = MIGRATIONS) -> apsw.Connection:
    """A connection to the store at `path`, made or brought up to date; may be used by several processes at once.

    Raises UserError when the file is of a newer LoRA Lab, is something else, is damaged, or cannot be written.
    """
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    db: apsw.Connection | None = None
    try:
        db = apsw.Connection(str(path))
        db.set_busy_timeout(BUSY_MS)
        _check(db, path, len(migrations))
        _wal(db)
        db.execute("PRAGMA mmap_size = 0; PRAGMA foreign_keys = ON; PRAGMA synchronous = NORMAL")
        _migrate(db, path, migrations)
        return db
    except apsw.Error as error:
        if db is not None:
            db.close()
        raise explained(error, path) from error
    except UserError:
        if db is not None:
            db.close()
        raise


def explained(error: apsw.Error, path: Path) -> Exception:
    """What SQLite says, as a sentence for a person where it is about the disk or the file; else the error itself."""
    if isinstance(error, apsw.FullError):
        return UserError(f"cannot write the run store {path}: the disk is full; make room and try again")
    if isinstance(error, (apsw.NotADBError, apsw.CorruptError)):
        return UserError(f"the run store {path} is damaged or no database; move it away to begin a new one")
    if isinstance(error, (apsw.ReadOnlyError, apsw.CantOpenError, apsw.PermissionsError)):
        return UserError(
            f"cannot write the run store {path}: no permission, or a read-only disk; "
            "name another folder with the environment variable LORA_LAB_HOME"
        )
    return error


def _check(db: apsw.Connection, path: Path, newest: int) -> None:
    version, application = db.pragma("user_version"), db.pragma("application_id")
    empty = not db.execute("SELECT count(*) FROM sqlite_schema").get
    if application != APPLICATION and not (empty and version == 0):
        raise UserError(f"{path} is a database of another program; name another folder with LORA_LAB_HOME")
    if version > newest:
        raise UserError(
            f"the run store {path} was written by a newer LoRA Lab (version {version} of the store, this one knows "
            f"{newest}); update LoRA Lab, or name another folder with LORA_LAB_HOME"
        )


def _wal(db: apsw.Connection) -> None:
    """Write-ahead logging: readers and one writer at a time do not wait for each other.

    SQLite does not wait for its busy timeout here when another process switches the mode at the same moment.
    """
    until = time.monotonic() + BUSY_MS / 1000
    while db.pragma("journal_mode") != "wal":
        try:
            db.pragma("journal_mode", "wal")
        except apsw.BusyError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)


def _migrate(db: apsw.Connection, path: Path, migrations: Sequence[str]) -> None:
    if db.pragma("user_version") == len(migrations):
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        _check(db, path, len(migrations))  # another process may have been first
        for number in range(db.pragma("user_version"), len(migrations)):
            db.execute(migrations[number])
        db.execute(f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {len(migrations)}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
