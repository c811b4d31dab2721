"""A room: its stages, its guesses, its cells, and who may do what when; and a workshop with thirty people."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.room.cells import Cells, Dispatcher
from app.room.grid import TOGETHER, Cell, Grid, Plan, batches, dealt, fair, parsed, starts
from app.room.question import Question, asked
from app.room.room import Room, counted
from app.runs.queue import RunQueue
from app.runs.store import RunStore
from lora_core.errors import UserError
from lora_core.families import TARGETS
from tests.room_kit import STAND_IN
from tests.room_server import serving
from tests.room_workshop import played, script
from tests.runs_kit import until

OWN = Question(kind="own", text="Which rank?", choices=("1", "8", "64"), right=1)
PLAY = asked({"kind": "play", "name": "first", "text": "Which first?", "choices": ["a", "b"], "right": 1})
GRID = Grid(model="stand-in", ranks=(1, 4), targets=(("q", "v"), TARGETS), task="pirate", steps=8)
RUN = Question(kind="own", text="Which cell?", choices=("small", "large"), act="grid")


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    found = Room(tmp_path)
    yield found
    found.close()


# ---- stages
def test_a_round_goes_forward_and_only_the_last_two_change_places(room: Room) -> None:
    assert room.stage == "lobby" and room.question is None
    with pytest.raises(UserError, match="press Predict first"):
        room.go("reveal")
    first = room.predict(OWN)
    assert room.stage == "predict" and room.question == OWN
    for stage in ("run", "reveal", "discuss", "reveal", "discuss"):
        room.go(stage)
        assert room.stage == stage
    with pytest.raises(UserError, match="the room is past run"):
        room.go("run")
    for wrong in ("lobby", "predict", "", None, 3):
        with pytest.raises(UserError):
            room.go(wrong)
    assert room.predict(PLAY) == first + 1 and room.stage == "predict"
    room.go("reveal")  # nothing has to be run
    assert room.stage == "reveal"


def test_every_change_moves_the_version_and_a_restart_finds_all(tmp_path: Path) -> None:
    room = Room(tmp_path)
    seen = [room.version]

    def moved() -> bool:
        seen.append(room.version)
        return seen[-1] != seen[-2]

    room.arrive("a1")
    assert moved()
    room.arrive("a1")  # asked again: nothing is new
    assert not moved()
    assert room.rename("a1", "  Ada \u202e Lovelace\n").called == "Ada Lovelace" and moved()
    id = room.predict(OWN)
    assert moved()
    room.guess("a1", id, 2)
    assert moved()
    room.go("run")
    assert moved()
    room.close()
    again = Room(tmp_path)
    assert (again.stage, again.round, again.question) == ("run", id, OWN)
    assert again.guesses(id) == {"a1": 2} and again.people()["a1"].name == "Ada Lovelace"
    assert (tmp_path / "room.db").stat().st_mode & 0o077 == 0  # for nobody else of this machine
    again.begin_anew()
    assert again.stage == "lobby" and not again.people() and again.question is None
    again.close()


def test_guesses_are_ones_own_may_change_and_end_with_the_stage(room: Room) -> None:
    id = room.predict(OWN)
    room.guess("a", id, 0)
    room.guess("b", id, 0)
    room.guess("a", id, 1)
    assert counted(OWN, room.guesses(id)) == [1, 1, 0]
    for wrong in (3, -1, True, "1", None, 1.0):
        with pytest.raises(UserError, match="choice is"):
            room.guess("a", id, wrong)
    room.go("run")
    with pytest.raises(UserError, match="guessing is over"):
        room.guess("a", id, 2)
    later = room.predict(OWN)
    with pytest.raises(UserError, match="gone on to another question"):
        room.guess("a", id, 2)
    assert room.guesses(id) == {"b": 0, "a": 1} and room.guesses(later) == {}


def test_a_curve_is_kept_once_and_only_finite(room: Room) -> None:
    id = room.predict(PLAY)
    with pytest.raises(UserError, match="no curve is asked for"):
        room.curve("a", id, 1, 120, [1.0, 0.5])
    room.go("run")
    assert room.curve("a", id, 7, 120, [1, 0.5, 1e300])
    assert not room.curve("a", id, 8, 120, [9.0, 9.0])  # sent again after a reload
    assert room.curves(id)[0].loss == (1.0, 0.5, 1e6) and room.curves(id)[0].seed == 7
    for loss in ([1.0], [1.0, float("nan")], [1.0, float("inf")], [1.0, "2"], [True, 1.0], "ab", None, [1.0] * 65):
        with pytest.raises(UserError, match="a curve has"):
            room.curve("b", id, 1, 120, loss)
    for seed, steps in ((-1, 120), (100, 120), (True, 120), (1, 0), (1, 1.5), ("1", 120)):
        with pytest.raises(UserError, match="a curve has"):
            room.curve("b", id, seed, steps, [1.0, 0.5])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kind": "own", "text": "?", "choices": ["a"]}, "2 to 5 choices"),
        ({"kind": "own", "text": "?", "choices": list("abcdef")}, "2 to 5 choices"),
        ({"kind": "own", "text": "?", "choices": ["a", " a "]}, "the same words"),
        ({"kind": "own", "text": " ", "choices": ["a", "b"]}, "the question is empty"),
        ({"kind": "own", "text": "x" * 301, "choices": ["a", "b"]}, "at most 300"),
        ({"kind": "own", "text": "?", "choices": ["a", "b"], "right": 2}, "right is 2"),
        ({"kind": "own", "text": "?", "choices": ["a", "b"], "right": True}, "right is True"),
        ({"kind": "own", "text": "?", "choices": ["a", "b"], "act": "play"}, "Play has its own"),
        ({"kind": "own", "text": "?", "choices": ["a", "b"], "act": "rm -rf"}, "act is"),
        ({"kind": "play", "name": "evil", "text": "?", "choices": ["a", "b"]}, "the presets of Play"),
        ({"kind": "card", "name": "rnak"}, "did you mean 'rank'"),
        ({"kind": "?"}, "kind is"),
    ],
)
def test_a_question_that_cannot_be_asked_is_told(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        asked(given)


def test_every_card_and_every_preset_can_be_asked() -> None:
    from app.room.question import PLAYS
    from lora_core.experiments import experiments

    for e in experiments():
        made = asked({"kind": "card", "name": e.name, "act": "grid"})
        assert made.text == e.question and Question.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    page = (Path(__file__).parent.parent / "app" / "static" / "playground.js").read_text(encoding="utf-8")
    assert [n for n in PLAYS if f'id: "{n}"' not in page] == []


# ---- whose turn it is
def cell(id: int, owner: str, before: int, *, seed: int = 0, steps: int = 8, status: str = "waiting") -> Cell:
    plan = Plan(model="m", rank=id, targets=("q",), task="pirate", steps=steps, seed=seed)
    return Cell(id=id, owner=owner, plan=plan, taken=float(id), estimate_s=10.0, status=status, before=before)


people = st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 2)), min_size=1, max_size=24)


@given(people)
@settings(deadline=None, max_examples=80)
def test_nobodys_second_run_starts_before_anybodys_first(taken: list[tuple[str, int]]) -> None:
    counted: dict[str, int] = {}
    cells = []
    for id, (owner, seed) in enumerate(taken):
        cells.append(cell(id, owner, counted.get(owner, 0), seed=seed))
        counted[owner] = counted.get(owner, 0) + 1
    groups = batches(cells)
    order = [c for g in groups for c in g]
    assert sorted(c.id for c in order) == [c.id for c in cells]  # each exactly once
    for i, g in enumerate(groups):
        assert len(g) <= TOGETHER and len({(c.plan.seed, c.plan.steps) for c in g}) == 1
        later = [c.before for h in groups[i + 1 :] for c in h]
        assert not later or max(c.before for c in g) <= min(later)
        assert g[0] == fair([c for h in groups[i:] for c in h])[0]  # who has waited longest is in the next batch
    mine = {o: [c.id for c in order if c.owner == o] for o in counted}
    assert all(ids == sorted(ids) for ids in mine.values())


def test_positions_and_starts_follow_from_the_batches() -> None:
    cells = [cell(1, "a", 0), cell(2, "b", 0, seed=1), cell(3, "c", 0), cell(4, "a", 1), cell(5, "d", 0, status="done")]
    assert [[c.id for c in g] for g in batches(cells)] == [[1, 3], [2], [4]]
    assert starts(batches(cells), left_s=7.0, each_s=5.0) == {1: (1, 7.0), 3: (2, 7.0), 2: (3, 32.0), 4: (4, 47.0)}


def test_cells_are_dealt_to_people_or_teams() -> None:
    assert [dealt(n, GRID) for n in range(1, 7)] == [0, 1, 2, 3, 0, 1]
    teams = Grid(**{**GRID.__dict__, "teams": 3})
    assert [dealt(n, teams) for n in range(1, 8)] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ranks": []}, "ranks are"),
        ({"ranks": [0]}, "ranks are"),
        ({"ranks": [True]}, "ranks are"),
        ({"ranks": list(range(1, 9))}, "ranks are"),
        ({"ranks": "1,2"}, "ranks are"),
        ({"targets": []}, "targets are"),
        ({"targets": ["qv"]}, "targets has 'qv'"),
        ({"targets": [["q", "evil"]]}, "a set is made of"),
        ({"task": "no"}, "the built-in tasks are"),
        ({"steps": 1}, "steps is 1"),
        ({"steps": 5.0}, "steps is 5.0"),
        ({"teams": 21}, "teams is 21"),
    ],
)
def test_a_grid_that_cannot_be_is_told(change: dict[str, Any], words: str) -> None:
    usual = {"ranks": [1, 8], "targets": [["v", "q"], "all"], "task": "pirate", "steps": 8}
    assert parsed(usual, "m").targets == (("q", "v"), TARGETS)
    with pytest.raises(UserError, match=words):
        parsed(usual | change, "m")


# ---- cells become runs
@pytest.fixture
def hall(room: Room, tmp_path: Path) -> Iterator[tuple[Cells, Dispatcher]]:
    store = RunStore(tmp_path, recorded=tmp_path / "nothing")
    queue = RunQueue(store, command=STAND_IN, tick_s=0.05).boot()
    dispatcher = Dispatcher(room, store, queue, gather_s=0.0)
    cells = Cells(room, store)
    cells.set_grid(GRID, [5.0, 6.0, 7.0, 8.0])
    room.predict(RUN)
    room.go("run")
    yield cells, dispatcher
    dispatcher.close()
    queue.close()
    store.close()


def settled(cells: Cells, dispatcher: Dispatcher) -> list[Cell]:
    def over() -> list[Cell]:
        dispatcher.tick()
        found = cells.all(cells.room.round or 0)
        return found if all(c.status not in ("waiting", "started") for c in found) else []

    return until(over)


def test_cells_of_one_grid_share_a_process_and_become_shared_runs(hall: tuple[Cells, Dispatcher]) -> None:
    cells, dispatcher = hall
    for i, owner in enumerate("abcd"):
        cells.take(owner, i)
    cells.take("e", 0)  # the same cell again: another seed, and so another batch
    found = settled(cells, dispatcher)
    assert [c.status for c in found] == ["done"] * 5
    runs = [run for c in found if (run := cells.run_of(c))]
    assert [r.owner for r in runs] == list("abcde") and all(r.shared for r in runs)
    assert [r.request.spec["rank"] for r in runs] == [1, 4, 1, 4, 1] and runs[1].request.spec["alpha"] == 8.0
    assert {c.batch for c in found[:4]} == {runs[0].id} and found[4].batch == runs[4].id
    assert found[4].plan.seed == 1 and runs[4].request.config["seed"] == 1
    assert len({r.pid for r in runs}) == 2  # two processes for five runs
    assert runs[1].loss == pytest.approx(3.0 - 0.3 * 2.0) and all(r.adapter for r in runs)


def test_what_may_be_taken_and_given_back(hall: tuple[Cells, Dispatcher]) -> None:
    cells, dispatcher = hall
    a = cells.take("a", 0)
    cells.take("a", 1)
    with pytest.raises(UserError, match="2 runs under way"):
        cells.take("a", 2)
    for wrong in (4, -1, True, "0", None):
        with pytest.raises(UserError, match="the grid has places 0 to 3"):
            cells.take("b", wrong)
    with pytest.raises(UserError, match="somebody else's"):
        cells.cancel("b", a.id)
    with pytest.raises(UserError, match="no cell"):
        cells.cancel("a", 99)
    cells.cancel("a", a.id)
    assert [c.status for c in cells.all(1)] == ["cancelled", "waiting"]
    b = cells.take("b", 0)
    assert b.plan.seed == 0  # it is free again
    assert fair(cells.all(1))[0].before == 0
    settled(cells, dispatcher)
    cells.room.predict(OWN)
    cells.room.go("run")
    with pytest.raises(UserError, match="no cells are handed out"):
        cells.take("b", 0)


def test_beyond_the_budget_nothing_more_is_queued(hall: tuple[Cells, Dispatcher]) -> None:
    cells, _ = hall
    cells.room.budget(0.5)  # 30 s: a process of 12 s, and cells of 5, 6 and 7
    taken = [cells.take(o, i).id for i, o in enumerate("abc")]
    with pytest.raises(UserError, match=r"the budget of 0.5 minutes is used up: 0.5 are taken"):
        cells.take("d", 3)
    cells.room.budget(1)
    cells.take("d", 3)
    assert cells.spent_s(cells.all(1)) == pytest.approx(12 + 5 + 6 + 7 + 8)
    cells.cancel(None, taken[2])
    assert cells.spent_s(cells.all(1)) == pytest.approx(12 + 5 + 6 + 8)
    for wrong in (0, -1, float("nan"), float("inf"), True, "10", 241):
        with pytest.raises(UserError, match="minutes is"):
            cells.room.budget(wrong)


def test_one_of_a_batch_is_cancelled_while_it_runs(hall: tuple[Cells, Dispatcher]) -> None:
    cells, dispatcher = hall
    cells.set_grid(Grid(**{**GRID.__dict__, "steps": 1000}), [5.0] * 4)
    mine, other = cells.take("a", 0), cells.take("b", 1)
    dispatcher.tick()
    cells.cancel("a", mine.id)
    found = {c.id: c for c in settled(cells, dispatcher)}
    runs = {id: run for id, c in found.items() if (run := cells.run_of(c))}
    assert runs[other.id].status == "done" and runs[other.id].step == 1000
    assert runs[mine.id].status == "stopped" and runs[mine.id].step < 1000


def test_a_killed_process_costs_nobody_their_cell(hall: tuple[Cells, Dispatcher]) -> None:
    import os
    import signal

    cells, dispatcher = hall
    cells.set_grid(Grid(**{**GRID.__dict__, "steps": 1000}), [5.0] * 4)
    for i, o in enumerate("abc"):
        cells.take(o, i)
    dispatcher.tick()
    ids = [c.run for c in cells.all(1)]
    until(lambda: all(cells.store.get(i).status == "running" for i in ids if i is not None))
    pid = cells.store.get(ids[0] or 0).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    found = settled(cells, dispatcher)
    assert [c.status for c in found] == ["done"] * 3 and [c.run for c in found] == ids
    assert max(c.tries for c in found) == 2


def test_a_kill_between_writing_a_cell_and_queueing_its_run(hall: tuple[Cells, Dispatcher],
                                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    cells, dispatcher = hall
    cells.take("a", 0)
    cells.take("b", 1)

    def cut(*_: object) -> None:
        raise SystemExit("the power went")

    with monkeypatch.context() as m:
        m.setattr("app.room.cells.bind", cut)
        with pytest.raises(SystemExit):
            dispatcher.tick()
    assert [c.status for c in cells.all(1)] == ["started"] * 2 and not cells.store.waiting()
    found = settled(cells, dispatcher)  # the next server finds them
    assert [c.status for c in found] == ["done"] * 2 and len(cells.store.list()) == 2


def test_only_one_of_two_servers_starts_cells(hall: tuple[Cells, Dispatcher], tmp_path: Path) -> None:
    cells, dispatcher = hall
    other = Dispatcher(cells.room, cells.store, dispatcher.queue, gather_s=0.0)
    cells.take("a", 0)
    dispatcher.tick()
    other.tick()
    settled(cells, dispatcher)
    assert len(cells.store.list()) == 1
    cells.take("b", 1)
    other.tick()
    assert cells.all(1)[1].status == "waiting"
    dispatcher.in_charge.release()  # the other takes over
    assert settled(cells, other)[1].status == "done"
    other.close()


def test_cells_that_a_question_left_waiting_come_after_those_of_the_next(hall: tuple[Cells, Dispatcher]) -> None:
    cells, dispatcher = hall
    cells.take("a", 0)
    later = cells.room.predict(RUN)
    cells.room.go("run")
    cells.take("b", 1)
    settled(cells, dispatcher)
    assert cells.all(later)[0].run == 1 and cells.all(1)[0].run is None
    until(lambda: dispatcher.tick() or cells.all(1)[0].status == "done")


def test_many_take_at_once_and_no_cell_is_lost(hall: tuple[Cells, Dispatcher]) -> None:
    cells, dispatcher = hall
    faults: list[Exception] = []

    def take(owner: str) -> None:
        try:
            cells.take(owner, hash(owner) % 4)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=take, args=(f"p{i}",)) for i in range(12)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not faults
    found = cells.all(1)
    assert len({c.owner for c in found}) == 12
    assert len({(c.plan.rank, c.plan.targets, c.plan.seed) for c in found}) == 12  # no run is made twice
    for c in found[3:]:
        cells.cancel(None, c.id)
    settled(cells, dispatcher)


# ---- the workshop
def test_the_workshops_script_takes_sixty_minutes_and_can_be_asked() -> None:
    from app.room.question import asked as made

    lines = script()
    ends = [line.at + line.minutes for line in lines]
    assert ends[:-1] == [line.at for line in lines[1:]] and ends[-1] == 60 and lines[0].at == 0
    assert {made(line.question).kind for line in lines if line.question} == {"play", "card", "own"}
    assert [line.key for line in lines if line.key == "run"] and lines[0].key == ""


@pytest.mark.parametrize("only", [pytest.param((0, 3), id="two-rounds"),
                                  pytest.param((), id="whole", marks=pytest.mark.slow)])  # fmt: skip
def test_thirty_people_play_the_workshop(tmp_path: Path, only: tuple[int, ...]) -> None:
    people = 30
    with serving(tmp_path, stand_in=True) as (url, keys):
        told = played(url, keys, poll_s=0.5, only=only)
    found = told.figures()
    print(found)
    rounds = [q for i, q in enumerate(line.question for line in script() if line.question) if i in only or not only]
    assert not told.faults, "\n".join(told.faults[:10])
    assert (found["rounds"], found["guesses"]) == (len(rounds), people * len(rounds))
    assert found["curves"] == people * sum(q["act"] == "play" for q in rounds)
    assert found["runs"] == 6 * sum(q["act"] == "grid" for q in rounds)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_thirty_people_play_the_workshop_on_the_real_model(tmp_path: Path) -> None:
    with serving(tmp_path) as (url, keys):
        grid = {"steps": 4, "minutes": 60}
        told = played(url, keys, poll_s=1.4, grid=grid)
    print(told.figures())
    assert not told.faults, "\n".join(told.faults[:10])
    assert told.runs == 6
