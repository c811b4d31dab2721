"""The room's state machine, kept in a database: people, rounds, stages, guesses and curves.

A round is one question. It goes forward through the stages predict, run, reveal, discuss; only the last two may change
places. Before reveal nobody is told what others guessed. Every change makes `version` grow, which pages ask for.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from app.room.question import Question, line
from app.runs.database import Database
from lora_core.errors import UserError

Stage = Literal["lobby", "predict", "run", "reveal", "discuss"]
STAGES: tuple[Stage, ...] = ("lobby", "predict", "run", "reveal", "discuss")
SHOWN = ("reveal", "discuss")  # stages in which everybody sees what was guessed and found
DATABASE = "room.db"
LONGEST_NAME = 24
HERE_S = 8.0  # somebody whose page has not asked for so long is away
MOST_PEOPLE = 500
CURVES, POINTS = 30, 64  # curves that the wall draws, and numbers of one of them at most

MIGRATIONS: tuple[str, ...] = (
    # 1: one line for the room; a round's question, a cell's plan and a curve are JSON text. A cell's `run` is the
    # number of its run in the store, once it has begun; the same run may be resumed, so it stays the same.
    """
    CREATE TABLE room (
        id          INTEGER PRIMARY KEY CHECK (id = 1),
        version     INTEGER NOT NULL DEFAULT 1,
        stage       TEXT    NOT NULL DEFAULT 'lobby'
                    CHECK (stage IN ('lobby', 'predict', 'run', 'reveal', 'discuss')),
        round       INTEGER,
        minutes     REAL    NOT NULL DEFAULT 10,
        grid        TEXT
    ) STRICT;
    CREATE TABLE people (
        owner  TEXT PRIMARY KEY,
        number INTEGER NOT NULL UNIQUE,
        name   TEXT NOT NULL DEFAULT '',
        joined REAL NOT NULL
    ) STRICT;
    CREATE TABLE rounds (
        id       INTEGER PRIMARY KEY AUTOINCREMENT,
        question TEXT NOT NULL,
        began    REAL NOT NULL
    ) STRICT;
    CREATE TABLE guesses (
        round  INTEGER NOT NULL,
        owner  TEXT    NOT NULL,
        choice INTEGER NOT NULL,
        at     REAL    NOT NULL,
        PRIMARY KEY (round, owner)
    ) STRICT;
    CREATE TABLE curves (
        round  INTEGER NOT NULL,
        owner  TEXT    NOT NULL,
        curve  TEXT    NOT NULL,
        PRIMARY KEY (round, owner)
    ) STRICT;
    CREATE TABLE cells (
        id         INTEGER PRIMARY KEY AUTOINCREMENT,
        round      INTEGER NOT NULL,
        owner      TEXT    NOT NULL,
        plan       TEXT    NOT NULL,
        taken      REAL    NOT NULL,
        estimate_s REAL    NOT NULL,
        status     TEXT    NOT NULL DEFAULT 'waiting'
                   CHECK (status IN ('waiting', 'started', 'done', 'failed', 'cancelled')),
        run        INTEGER,
        batch      INTEGER,
        tries      INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    """,
)


@dataclass(frozen=True, kw_only=True)
class Person:
    """number: from 1, in the order of arrival; name: a nickname, or ""."""

    owner: str
    number: int
    name: str

    @property
    def called(self) -> str:
        return self.name or f"person {self.number}"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The loss of one device's Play, at evenly spaced steps from 0 to `steps`."""

    owner: str
    seed: int
    steps: int
    loss: tuple[float, ...]


class Room:
    """The room of one server. May be shared by threads. home: LoRA Lab's folder."""

    def __init__(self, home: Path) -> None:
        self.path = home / DATABASE
        self.db = Database(self.path, MIGRATIONS)
        with suppress(OSError):  # who guessed what is nobody else's
            os.chmod(self.path, 0o600)
        with self.db.transaction():
            self.db.execute("INSERT OR IGNORE INTO room (id) VALUES (1)")
        self.seen: dict[str, float] = {}
        self.ticks = int(time.time()) % 1_000_000  # what moves without a change of the database: steps of a run
        self.lock = threading.Lock()

    def close(self) -> None:
        self.db.close()

    # ---- reading
    @property
    def version(self) -> str:
        """Changes with everything that a page shows."""
        return f"{self.db.rows('SELECT version FROM room')[0][0]}.{self.ticks}"

    @property
    def stage(self) -> Stage:
        return self.db.rows("SELECT stage FROM room")[0][0]

    @property
    def round(self) -> int | None:
        return self.db.rows("SELECT round FROM room")[0][0]

    @property
    def minutes(self) -> float:
        """The budget of the present round: how long the machine may train for it."""
        return float(self.db.rows("SELECT minutes FROM room")[0][0])

    @property
    def question(self) -> Question | None:
        """What is asked now, or was last."""
        rows = self.db.rows("SELECT question FROM rounds WHERE id = (SELECT round FROM room)")
        return Question.from_dict(json.loads(rows[0][0])) if rows else None

    def rounds(self) -> list[tuple[int, Question]]:
        """All rounds, the first one first."""
        return [(int(i), Question.from_dict(json.loads(q)))
                for i, q in self.db.rows("SELECT id, question FROM rounds ORDER BY id")]  # fmt: skip

    def people(self) -> dict[str, Person]:
        rows = self.db.rows("SELECT owner, number, name FROM people ORDER BY number")
        return {o: Person(owner=o, number=n, name=name) for o, n, name in rows}

    def here(self) -> int:
        """How many people's pages have asked within the last seconds."""
        now = time.monotonic()
        return sum(now - at < HERE_S for at in list(self.seen.values()))

    def guesses(self, round: int) -> dict[str, int]:
        """{owner: choice}. Whoever shows them must have looked at the stage."""
        return dict(self.db.rows("SELECT owner, choice FROM guesses WHERE round = ? ORDER BY at", (round,)))

    def curves(self, round: int) -> list[Curve]:
        rows = self.db.rows("SELECT owner, curve FROM curves WHERE round = ? ORDER BY rowid", (round,))
        found = [(o, json.loads(c)) for o, c in rows]
        return [Curve(owner=o, seed=c["seed"], steps=c["steps"], loss=tuple(c["loss"])) for o, c in found]

    # ---- what people do
    def arrive(self, owner: str) -> Person:
        """Somebody's page asks: they are here, and have a number from the first time on."""
        self.seen[owner] = time.monotonic()
        rows = self.db.rows("SELECT number, name FROM people WHERE owner = ?", (owner,))
        if rows:
            return Person(owner=owner, number=rows[0][0], name=rows[0][1])
        with self.db.told(), self.db.transaction():
            n = self.db.rows("SELECT count(*) FROM people")[0][0]
            if n >= MOST_PEOPLE:
                raise UserError(f"the room is full: {MOST_PEOPLE} people are known here")
            self.db.execute("INSERT INTO people (owner, number, joined) VALUES (?, ?, ?)", (owner, n + 1, time.time()))
            self.changed()
        return Person(owner=owner, number=n + 1, name="")

    def rename(self, owner: str, name: Any) -> Person:
        """Take a nickname of at most 24 characters; "" for none."""
        clean = "" if name == "" else line(name, LONGEST_NAME, "the nickname")
        self.arrive(owner)
        with self.db.told(), self.db.transaction():
            self.db.execute("UPDATE people SET name = ? WHERE owner = ?", (clean, owner))
            self.changed()
        return self.arrive(owner)

    def guess(self, owner: str, round: Any, choice: Any) -> None:
        """Lock a choice for the present round; may be changed until the presenter goes on."""
        question = self.question
        if question is None or round != self.round:
            raise UserError("the presenter has gone on to another question; yours is over")
        if isinstance(choice, bool) or not isinstance(choice, int) or not 0 <= choice < len(question.choices):
            raise UserError(f"choice is {choice!r}; it is a number from 0 to {len(question.choices) - 1}")
        self.arrive(owner)
        with self.db.told(), self.db.transaction():
            if self.stage != "predict":
                raise UserError("guessing is over for this question; the next one comes soon")
            self.db.execute("INSERT INTO guesses VALUES (?, ?, ?, ?) ON CONFLICT (round, owner) "
                            "DO UPDATE SET choice = excluded.choice, at = excluded.at",
                            (round, owner, choice, time.time()))  # fmt: skip
            self.changed()

    def curve(self, owner: str, round: Any, seed: Any, steps: Any, loss: Any) -> bool:
        """Keep the curve of somebody's Play, the first one that comes; whether it was new."""
        question = self.question
        if question is None or round != self.round or question.act != "play" or self.stage not in STAGES[2:]:
            raise UserError("no curve is asked for now")
        good = isinstance(loss, list) and 2 <= len(loss) <= POINTS
        good = good and all(_number(v) and v >= 0 for v in loss)
        if not good or not _whole(seed, 0, 99) or not _whole(steps, 1, 100_000):
            raise UserError(f"a curve has a seed from 0 to 99, its steps, and 2 to {POINTS} finite numbers")
        kept = json.dumps({"seed": seed, "steps": steps, "loss": [float(f"{min(v, 1e6):.4g}") for v in loss]})
        self.arrive(owner)
        with self.db.told(), self.db.transaction():
            new = self.db.execute("INSERT OR IGNORE INTO curves VALUES (?, ?, ?)", (round, owner, kept))
            if new:
                self.changed()
        return bool(new)

    # ---- what the presenter does
    def predict(self, question: Question) -> int:
        """Ask a new question; gives the number of its round."""
        with self.db.told(), self.db.transaction(sure=True):
            self.db.execute("INSERT INTO rounds (question, began) VALUES (?, ?)",
                            (json.dumps(question.to_dict()), time.time()))  # fmt: skip
            id = int(self.db.connection.last_insert_rowid())
            self.db.execute("UPDATE room SET stage = 'predict', round = ?", (id,))
            self.changed()
        return id

    def go(self, stage: Any) -> None:
        """Bring the present round to run, reveal or discuss. UserError where it cannot go there."""
        if stage not in STAGES[2:]:
            raise UserError(f"stage is {stage!r}; a round goes on to run, reveal or discuss")
        with self.db.told(), self.db.transaction(sure=True):
            now = self.stage
            if now == "lobby":
                raise UserError("nothing is asked yet; press Predict first")
            if STAGES.index(stage) < STAGES.index(now) and not (now == "discuss" and stage == "reveal"):
                raise UserError(f"the room is past {stage}: all have seen what was guessed; press Predict for the next "
                                "question")  # fmt: skip
            self.db.execute("UPDATE room SET stage = ?", (stage,))
            self.changed()

    def budget(self, minutes: Any) -> None:
        """How many minutes of training the round may take."""
        if not _number(minutes) or not 0 < minutes <= 240:
            raise UserError(f"minutes is {minutes!r}; the budget is from a moment to 240 minutes")
        with self.db.told(), self.db.transaction():
            self.db.execute("UPDATE room SET minutes = ?", (float(minutes),))
            self.changed()

    def begin_anew(self) -> None:
        """An empty room with the same links: people, rounds and guesses go; runs stay in the store."""
        with self.db.told(), self.db.transaction(sure=True):
            if self.db.rows("SELECT 1 FROM cells WHERE status = 'started' LIMIT 1"):
                raise UserError("a run of this room is being trained; cancel it or wait, then begin anew")
            for table in ("people", "rounds", "guesses", "curves", "cells"):
                self.db.execute(f"DELETE FROM {table}")
            self.db.execute("UPDATE room SET stage = 'lobby', round = NULL")
            self.changed()
        self.seen.clear()

    # ---- inside
    def changed(self) -> None:
        """Make the version grow, within a transaction: pages that have the one before ask for all."""
        self.db.execute("UPDATE room SET version = version + 1")

    def tick(self) -> None:
        """Something that pages show has moved that is not in the database."""
        with self.lock:
            self.ticks += 1


def counted(question: Question, guesses: Mapping[str, int]) -> list[int]:
    """How many chose each of the choices."""
    given: Sequence[int] = list(guesses.values())
    return [given.count(i) for i in range(len(question.choices))]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
