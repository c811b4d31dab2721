"""The grid of settings that a room runs on the real model: which cells there are, and whose turn it is.

Pure functions: what is taken, queued and trained is in cells.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from app.runs.run import RunRequest
from lora_core.errors import UserError
from lora_core.families import TARGETS

MOST_RANKS, MOST_SETS, MOST_TEAMS = 6, 4, 20
TOGETHER = 6  # runs that one process trains in shared batches; more only make each wait for all


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Ranks by sets of matrices, on one task. teams: 0 when every person stands for themselves.

    α is 2r in every cell, so that s = α/r is the same for all.
    """

    model: str
    ranks: tuple[int, ...] = (1, 8, 64)
    targets: tuple[tuple[str, ...], ...] = (("q", "v"), TARGETS)
    task: str = "restaurant"
    steps: int = 30
    teams: int = 0

    @property
    def places(self) -> list[tuple[int, tuple[str, ...]]]:
        """(rank, matrices) of every cell, row by row."""
        return [(r, t) for t in self.targets for r in self.ranks]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ranks": list(self.ranks), "targets": [list(t) for t in self.targets]}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Grid:
        """Inverse of `to_dict`."""
        return cls(**{**d, "ranks": tuple(d["ranks"]), "targets": tuple(tuple(t) for t in d["targets"])})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one cell trains; seed: 0 for the first who takes it, 1 for the second, so that no run is made twice."""

    model: str
    rank: int
    targets: tuple[str, ...]
    task: str
    steps: int
    seed: int = 0

    @property
    def says(self) -> str:
        return f"r {self.rank} · {set_name(self.targets)}"

    def request(self) -> RunRequest:
        spec = {"targets": list(self.targets), "rank": self.rank, "alpha": 2.0 * self.rank}
        # the held-out loss at the start and at the end alone: the base model's is measured once for all that train
        config = {"steps": self.steps, "seed": self.seed, "eval_every": self.steps}
        return RunRequest(model=self.model, task=self.task, spec=spec, config=config)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"targets": list(self.targets)}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Plan:
        """Inverse of `to_dict`."""
        return cls(**{**d, "targets": tuple(d["targets"])})


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell that somebody took. before: how many cells its owner had taken before it."""

    id: int
    owner: str
    plan: Plan
    taken: float
    estimate_s: float
    status: str
    run: int | None = None
    batch: int | None = None
    tries: int = 0
    before: int = 0


def set_name(targets: Sequence[str]) -> str:
    """ "q v"; "all" for every matrix of attention and MLP."""
    return "all" if set(targets) >= set(TARGETS) else " ".join(targets)


def parsed(given: Mapping[str, Any], model: str) -> Grid:
    """The grid of a request: ranks [1, 8, 64], targets [["q", "v"], "all"], task, steps, teams. UserError for others.

    What the model has of these matrices is for the caller to check.
    """
    ranks = given.get("ranks")
    if not isinstance(ranks, list) or not 1 <= len(ranks) <= MOST_RANKS or any(
            isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= 512 for r in ranks):  # fmt: skip
        raise UserError(f"ranks are 1 to {MOST_RANKS} whole numbers from 1 to 512; given {ranks!r:.60}")
    sets = given.get("targets")
    if not isinstance(sets, list) or not 1 <= len(sets) <= MOST_SETS:
        raise UserError(f"targets are 1 to {MOST_SETS} sets of matrices, such as q,v and all; given {sets!r:.60}")
    found = []
    for each in sets:
        names = TARGETS if each == "all" else tuple(each) if isinstance(each, list) else ()
        if not names or any(n not in TARGETS for n in names):
            raise UserError(f"targets has {each!r:.60}; a set is made of {' '.join(TARGETS)}, or is all")
        found.append(tuple(t for t in TARGETS if t in names))
    task = given.get("task")
    from lora_core.tasks import task_names

    if not isinstance(task, str) or task not in dict(task_names()):
        raise UserError(f"task is {task!r:.40}; the built-in tasks are {' '.join(n for n, _ in task_names())}")
    steps, teams = given.get("steps"), given.get("teams", 0)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 2 <= steps <= 1000:
        raise UserError(f"steps is {steps!r:.40}; it is a whole number from 2 to 1,000")
    if isinstance(teams, bool) or not isinstance(teams, int) or not 0 <= teams <= MOST_TEAMS:
        raise UserError(f"teams is {teams!r:.40}; it is a number up to {MOST_TEAMS}, 0 for none")
    return Grid(model=model, ranks=tuple(dict.fromkeys(ranks)), targets=tuple(dict.fromkeys(found)), task=str(task),
                steps=steps, teams=teams)  # fmt: skip


def unit(number: int, teams: int) -> int:
    """The team of the person of that number (from 1), from 0; without teams everybody is one."""
    return (number - 1) % teams if teams else number - 1


def dealt(number: int, grid: Grid) -> int:
    """Which cell is handed to the person of that number: an index into `grid.places`."""
    return unit(number, grid.teams) % len(grid.places)


def fair(cells: Sequence[Cell]) -> list[Cell]:
    """The waiting cells in the order in which they start: nobody's second run before anybody's first."""
    return sorted((c for c in cells if c.status == "waiting"), key=lambda c: (c.before, c.taken, c.id))


def batches(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The waiting cells as they will be trained: the next one of the fair order, and with it those that share its rows,
    steps and seed, as long as nobody's second run comes before the first of somebody who is left waiting."""
    left, found = fair(cells), []
    while left:
        group: list[Cell] = []
        passed = math.inf  # the fewest runs that somebody had before who is left waiting
        for c in left:
            if len(group) < TOGETHER and c.before <= passed and (not group or alike(group[0].plan, c.plan)):
                group.append(c)
            else:
                passed = min(passed, c.before)
        found.append(group)
        taken = {c.id for c in group}
        left = [c for c in left if c.id not in taken]
    return found


def alike(a: Plan, b: Plan) -> bool:
    """Whether one batch can serve both."""
    return (a.model, a.task, a.steps, a.seed) == (b.model, b.task, b.steps, b.seed)


def starts(groups: Iterable[Sequence[Cell]], left_s: float, each_s: float) -> dict[int, tuple[int, float]]:
    """{cell: (its position from 1, seconds until it starts)} of all that wait, in their batches.

    left_s  until what is being trained is over; each_s: what a process takes besides its steps
    """
    found: dict[int, tuple[int, float]] = {}
    at, position = left_s, 0
    for group in groups:
        for c in group:
            position += 1
            found[c.id] = (position, at)
        at += each_s + sum(c.estimate_s for c in group)
    return found
