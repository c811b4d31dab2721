"""Cells of the grid: taken by people, started fairly and together, followed until their runs are over."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from app.room.grid import TOGETHER, Cell, Grid, Plan, batches, starts
from app.room.room import STAGES, Room
from app.runs.process import Lock
from app.runs.queue import RunQueue
from app.runs.run import Run
from app.runs.store import RunStore
from app.runs.together import bind
from lora_core.errors import UserError

EACH_S = 12.0  # what a process takes besides its steps, before one has been seen: to start, to load, to save
PER_PERSON = 2  # cells that somebody may have waiting or running at once
TRIES = 3  # of a run whose process was killed
TICK_S = 0.5
LIVE = ("waiting", "started")
GATHER_S = 3.0  # that the first of a batch waits for others who press their cells in the same moment
COLUMNS = "id, owner, plan, taken, estimate_s, status, run, batch, tries"
logger = logging.getLogger("lora_lab.room")


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a round's cells stand: their runs, and of those that wait {cell: (position, seconds until it starts)}.

    earlier  cells of the rounds before that wait or are being trained
    """

    cells: list[Cell]
    earlier: list[Cell]
    runs: Mapping[int, Run]
    queue: Mapping[int, tuple[int, float]]
    spent_s: float
    each_s: float


class Cells:
    """The cells of a room, over its database and the run store."""

    def __init__(self, room: Room, store: RunStore) -> None:
        self.room, self.store = room, store
        self.kept: tuple[str, Standing] | None = None  # of the newest version: thirty pages ask for the same

    # ---- reading
    def all(self, round: int) -> list[Cell]:
        """The cells of a round as they were taken, each with how many its owner had taken before."""
        rows = self.room.db.rows(f"SELECT {COLUMNS} FROM cells WHERE round = ? ORDER BY id", (round,))
        found: list[Cell] = []
        for id, owner, plan, taken, estimate_s, status, run, batch, tries in rows:
            before = sum(c.owner == owner and c.status != "cancelled" for c in found)
            found.append(Cell(id=id, owner=owner, plan=Plan.from_dict(json.loads(plan)), taken=taken, run=run,
                              estimate_s=estimate_s, status=status, batch=batch, tries=tries,
                              before=before))  # fmt: skip
        return found

    def grid(self) -> tuple[Grid, list[float]] | None:
        """The grid, and the seconds that each of its places is estimated to take; None before one is set."""
        text = self.room.db.rows("SELECT grid FROM room")[0][0]
        if text is None:
            return None
        d = json.loads(text)
        return Grid.from_dict(d["grid"]), d["estimates"]

    def run_of(self, cell: Cell) -> Run | None:
        """Its run, as the store has it; None before it has begun, and when it was deleted."""
        if cell.run is None:
            return None
        with suppress(UserError):
            return self.store.get(cell.run)
        return None

    def standing(self) -> Standing:
        """How the present round's cells stand."""
        version = self.room.version
        if self.kept is None or self.kept[0] != version:
            cells = self.all(self.room.round) if self.room.round is not None else []
            before = [[c for c in self.all(r) if c.status in LIVE] for r in self.live_rounds() if r != self.room.round]
            earlier, each_s = [c for found in before for c in found], self.each_s(cells)
            groups = (group for found in (cells, *before) for group in batches(found))  # in the order of their turns
            self.kept = (version, Standing(
                cells=cells, earlier=earlier, runs={c.id: run for c in (*cells, *earlier) if (run := self.run_of(c))},
                each_s=each_s, queue=starts(groups, self.left_s([*cells, *earlier]), each_s),
                spent_s=self.spent_s(cells)))  # fmt: skip
        return self.kept[1]

    def live_rounds(self) -> list[int]:
        """The rounds of which cells wait or are being trained, the newest first."""
        rows = self.room.db.rows("SELECT DISTINCT round FROM cells WHERE status IN (?, ?) ORDER BY round DESC", LIVE)
        return [round for (round,) in rows]

    def spent_s(self, cells: Sequence[Cell]) -> float:
        """Seconds of training that the cells have taken, and will take by their estimates."""
        waiting, seen = batches(cells), {c.batch for c in cells if c.batch is not None}
        total = self.each_s(cells) * (len(waiting) + len(seen))
        for c in cells:
            run = self.run_of(c)
            if c.status in LIVE:
                total += c.estimate_s
            elif run is not None and run.result.get("train_s"):
                total += float(run.result["train_s"])
        return total

    def each_s(self, cells: Sequence[Cell]) -> float:
        """What a process takes besides its steps: as the last one of the room did."""
        groups: dict[int, list[Run]] = {}
        for c in cells:
            if c.batch is not None and (run := self.run_of(c)) and run.result.get("wall_s"):
                groups.setdefault(c.batch, []).append(run)
        for runs in reversed(list(groups.values())):
            wall = max(float(r.result["wall_s"]) for r in runs)
            return max(1.0, wall - sum(float(r.result.get("train_s", 0.0)) for r in runs))
        return EACH_S

    def left_s(self, cells: Sequence[Cell]) -> float:
        """Seconds until what is being trained is over, by its steps so far."""
        live = [(c, run) for c in cells if c.status == "started" and (run := self.run_of(c))]
        return sum(c.estimate_s * (1 - run.step / max(1, run.steps)) for c, run in live) + (
            self.each_s(cells) if live and not any(r.step for _, r in live) else 0.0)  # fmt: skip

    # ---- what people do
    def set_grid(self, grid: Grid, estimates: Sequence[float]) -> None:
        """The presenter's grid; cells that were taken of another stay as they are."""
        text = json.dumps({"grid": grid.to_dict(), "estimates": [round(s, 1) for s in estimates]})
        with self.room.db.told(), self.room.db.transaction():
            self.room.db.execute("UPDATE room SET grid = ?", (text,))
            self.room.changed()

    def take(self, owner: str, place: Any) -> Cell:
        """Put a cell of the grid into the queue for somebody. UserError when it may not be, which says why."""
        round, question, known = self.room.round, self.room.question, self.grid()
        if round is None or question is None or question.act != "grid" or self.room.stage not in STAGES[2:]:
            raise UserError("no cells are handed out now; the presenter begins with Run")
        if known is None:
            raise UserError("the presenter has not set the grid yet")
        grid, estimates = known
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(grid.places):
            raise UserError(f"place is {place!r:.40}; the grid has places 0 to {len(grid.places) - 1}")
        rank, targets = grid.places[place]
        with self.room.db.told(), self.room.db.transaction(sure=True):
            cells = self.all(round)
            mine = [c for c in cells if c.owner == owner and c.status in LIVE]
            if len(mine) >= PER_PERSON:
                raise UserError(f"you have {len(mine)} runs under way; take the next when one of them is done")
            needed = estimates[place] + self.each_s(cells) * (not any(c.status == "waiting" for c in cells))
            spent, budget = self.spent_s(cells), 60 * self.room.minutes
            if spent + needed > budget:
                raise UserError(f"the budget of {self.room.minutes:g} minutes is used up: {spent / 60:.1f} are taken, "
                                f"and this cell needs {needed / 60:.1f}; the presenter can give more")  # fmt: skip
            same = [c.plan.seed for c in cells if c.status != "cancelled" and (c.plan.rank, c.plan.targets, c.plan.task,
                    c.plan.steps) == (rank, targets, grid.task, grid.steps)]  # fmt: skip
            plan = Plan(model=grid.model, rank=rank, targets=targets, task=grid.task, steps=grid.steps,
                        seed=next(s for s in range(len(same) + 1) if s not in same))  # fmt: skip
            self.room.db.execute("INSERT INTO cells (round, owner, plan, taken, estimate_s) VALUES (?, ?, ?, ?, ?)",
                                 (round, owner, json.dumps(plan.to_dict()), time.time(), estimates[place]))  # fmt: skip
            id = int(self.room.db.connection.last_insert_rowid())
            self.room.changed()
        return next(c for c in self.all(round) if c.id == id)

    def cancel(self, owner: str | None, id: Any) -> None:
        """Give a waiting cell back, or end its run after the present step. owner: whose it must be; None: anybody's."""
        standing = self.standing()
        found = [c for c in (*standing.cells, *standing.earlier) if c.id == id and not isinstance(id, bool)]
        if not found:
            raise UserError(f"there is no cell {id!r:.20} that could be cancelled")
        cell = found[0]
        if owner is not None and cell.owner != owner:
            raise UserError("that run is somebody else's; you can cancel your own")
        if cell.status == "waiting":
            self.update([cell.id], status="cancelled")
        elif cell.status == "started" and cell.run is not None:
            self.store.ask_to_stop(cell.run)

    # ---- inside
    def update(self, ids: Sequence[int], **values: Any) -> None:
        names, marks = ", ".join(f"{n} = ?" for n in values), ",".join("?" * len(ids))
        with self.room.db.told(), self.room.db.transaction(sure=True):
            self.room.db.execute(f"UPDATE cells SET {names} WHERE id IN ({marks})", (*values.values(), *ids))
            self.room.changed()


class Dispatcher:
    """Starts the cells whose turn it is, and notes how their runs end; one of several servers on a store does it."""

    def __init__(self, room: Room, store: RunStore, queue: RunQueue, gather_s: float = GATHER_S) -> None:
        self.gather_s = gather_s
        self.room, self.store, self.queue, self.cells = room, store, queue, Cells(room, store)
        self.in_charge = Lock(room.path.parent, "room.lock")
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="room", daemon=True)
        self.steps, self.warned = -1, ""

    def boot(self) -> None:
        self.thread.start()

    def close(self) -> None:
        self.over.set()
        if self.thread.is_alive():
            self.thread.join()
        self.in_charge.release()

    def _watch(self) -> None:
        while not self.over.wait(TICK_S):
            try:
                self.tick()
                self.warned = ""
            except Exception as error:  # a full disk, for instance: it is tried again, and told once
                if self.warned != str(error):
                    self.warned = str(error)
                    logger.warning("the room waits: %s", error)

    def tick(self) -> None:
        """Look once: which runs are over, and what can start."""
        if self.in_charge.fd < 0 and not self.in_charge.take(0):
            return
        rounds = self.cells.live_rounds()
        if not rounds:
            return
        live = 0
        for round in reversed(rounds):
            live += self._follow([c for c in self.cells.all(round) if c.status == "started"])
        if not live:  # what the room looks at now goes first; what an earlier question left waiting comes after it
            cells = self.cells.all(rounds[0])
            gathering = [c for c in cells if c.status == "waiting" and time.time() - c.taken < self.gather_s]
            for group in batches(cells)[:1]:
                if len(group) == TOGETHER or group[0] not in gathering:
                    self._start(group)

    def _follow(self, started: Sequence[Cell]) -> int:
        """Note how started cells stand; how many are still to be waited for."""
        lost: dict[int, list[tuple[Cell, Run]]] = {}
        steps, live = 0, 0
        for c in started:
            run = self.cells.run_of(c)
            if run is None:
                self.cells.update([c.id], status="failed")
                continue
            steps += run.step
            if run.status == "failed" or run.status == "interrupted" and c.tries >= TRIES:
                self.cells.update([c.id], status="failed")
            elif run.status in ("done", "diverged") or run.status == "stopped" and run.step:
                self.cells.update([c.id], status="done")
            elif run.status == "stopped":
                self.cells.update([c.id], status="cancelled")
            else:
                live += 1
                if run.status == "interrupted" or self._forgotten(c, run):
                    lost.setdefault(c.batch or run.id, []).append((c, run))
        for group in lost.values():
            self._again(group)
        if steps != self.steps:
            self.steps = steps
            self.room.tick()
        return live

    def _forgotten(self, cell: Cell, run: Run) -> bool:
        """Whether it waits for a run that will not take it along: the server was killed before that was queued."""
        if run.status != "queued" or run.position is not None:
            return False
        if cell.batch is None or cell.batch == run.id:
            return True
        with suppress(UserError):
            first = self.store.get(cell.batch)
            return not (first.status == "running" or first.position is not None)
        return True

    def _start(self, group: Sequence[Cell]) -> None:
        """Make the runs of a batch and queue its first. The cells know their runs before anything can start."""
        runs = [self.store.create(c.plan.request(), owner=c.owner) for c in group]
        with self.room.db.told(), self.room.db.transaction(sure=True):
            for c, run in zip(group, runs, strict=True):
                self.room.db.execute("UPDATE cells SET status = 'started', run = ?, batch = ?, tries = 1 WHERE id = ? "
                                     "AND status = 'waiting'", (run.id, runs[0].id, c.id))  # fmt: skip
                if not self.room.db.connection.changes():  # cancelled in this moment
                    self.store.ask_to_stop(run.id)
            self.room.changed()
        for run in runs:
            self.store.share(run.id)
        ready = [r for r in runs if self.store.get(r.id).status == "queued"]
        if ready:
            with self.room.db.transaction():
                self.room.db.execute(f"UPDATE cells SET batch = ? WHERE run IN ({','.join('?' * len(ready))})",
                                     (ready[0].id, *(r.id for r in ready)))  # fmt: skip
            bind(self.store, ready)
            self.queue.wake.set()

    def _again(self, group: Sequence[tuple[Cell, Run]]) -> None:
        """Queue runs whose process was killed, or that never were: together once more, from their checkpoints."""
        runs = [r for _, r in group]
        self.cells.update([c.id for c, _ in group], batch=runs[0].id)
        for c, _ in group:
            self.cells.update([c.id], tries=c.tries + 1)
        bind(self.store, runs)
        for run in runs[1:]:
            if run.status == "interrupted":
                bind(self.store, [run])
        self.queue.wake.set()
