"""The room's addresses: who is told what when, who may do what, and a room that is not there."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.pages.keys import Keys
from app.pages.room import invitation, open_room
from app.runs.queue import RunQueue
from app.runs.store import RunStore
from app.server import create_app
from tests.pages_kit import BASE, ask, client, say
from tests.room_kit import STAND_IN
from tests.runs_kit import until

QUESTION = {"kind": "own", "text": "Which <b>rank</b>?", "choices": ["=1+1", "8", "${P.push(7)}"], "right": 1}
PLAY = {"kind": "play", "name": "first", "text": "Which first?", "choices": ["all", "large"], "right": 1}


@dataclass
class Hall:
    """A server with a room, and people who came in by its links."""

    app: Any
    keys: Keys
    presenter: TestClient

    def come(self) -> TestClient:
        found = TestClient(self.app, base_url=BASE)
        assert found.get(f"/lab/api/ping?key={self.keys.participant}").json() == {"here": True}
        return found

    def step(self, stage: str, question: dict[str, Any] | None = None) -> dict[str, Any]:
        more = {"question": question} if question else {}
        return say(self.presenter, "room-step", stage=stage, **more)


def view(page: TestClient, **more: Any) -> dict[str, Any]:
    return ask(page, "room", **more)["room"]


@pytest.fixture(scope="module")
def hall(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hall]:
    home = tmp_path_factory.mktemp("room")
    store = RunStore(home, recorded=home / "nothing")
    keys = Keys.kept(home, room=True)
    opened = open_room(store, model="stand-in", participants="http://10.0.0.1:7860/?key=k", minutes=10)
    app = create_app(store, RunQueue(store, command=STAND_IN, tick_s=0.05), model=None, keys=keys, room=opened)
    with TestClient(app, base_url=BASE) as presenter:
        presenter.get(f"/lab/api/ping?key={keys.presenter}")
        yield Hall(app, keys, presenter)


def test_outside_a_room_nothing_of_it_is_seen(tmp_path: Path) -> None:
    with client(RunStore(tmp_path)) as page:
        assert ask(page, "room") == {"room": None}
        html = page.get("/").text
        assert "room.js" not in html and "room.css" not in html and "room_" not in html and "main.js" in html
        assert "there is no room here" in say(page, "room-step", stage="run")["error"]
        assert page.get("/lab/api/room.csv").status_code == 404
        assert not (tmp_path / "room.db").exists()


def test_in_a_room_the_page_loads_its_modules(hall: Hall) -> None:
    html = hall.presenter.get("/").text
    assert "room.js" in html and "room.css" in html
    assert TestClient(hall.app, base_url=BASE).get("/lab/api/room").status_code == 401


def test_guesses_are_nobodys_before_reveal(hall: Hall) -> None:
    a, b = hall.come(), hall.come()
    hall.step("predict", QUESTION)
    round = view(a)["round"]
    assert say(a, "room-guess", round=round, choice=1) == {"guess": 1}
    assert say(b, "room-guess", round=round, choice=2) == {"guess": 2}
    seen = view(a)
    assert seen["question"]["choices"] == QUESTION["choices"] and "right" not in seen["question"]
    assert (seen["guess"], seen["guessed"]) == (1, 2)
    for page in (a, b, hall.presenter):
        now = view(page)
        assert "bars" not in now and "right" not in now and ask(page, "room-wall")["wall"] is None
    assert view(b)["guess"] == 2 and "guess" not in view(hall.presenter)
    rows = list(csv.reader(io.StringIO(hall.presenter.get("/lab/api/room.csv").text)))
    assert not [r for r in rows if r[0] == str(round) and r[3] == "guess"]
    hall.step("reveal")
    for page in (a, b, hall.presenter):
        assert view(page)["bars"] == [0, 1, 1] and view(page)["right"] == 1
        wall = ask(page, "room-wall")["wall"]
        assert wall["guesses"]["counts"] == [0, 1, 1]
        assert wall["guesses"]["say"] == "1 of 2 chose the right answer, “8”."
    assert "guessing is over" in say(a, "room-guess", round=round, choice=0)["error"]


def test_late_arrivals_and_reloads_join_at_the_stage(hall: Hall) -> None:
    hall.step("predict", PLAY)
    a = hall.come()
    say(a, "room-name", name="Ada")
    say(a, "room-guess", round=view(a)["round"], choice=1)
    hall.step("run")
    again = TestClient(hall.app, base_url=BASE, cookies=dict(a.cookies))  # a reload: the same cookie
    assert (view(again)["name"], view(again)["guess"], view(again)["stage"]) == ("Ada", 1, "run")
    late = view(hall.come())
    assert (late["stage"], late["question"]["name"], late["guess"]) == ("run", "first", None)
    seen = view(a)["version"]
    assert set(view(a, seen=seen)) == {"version", "here"}  # small, where nothing has changed


def test_curves_come_once_and_the_wall_draws_their_median(hall: Hall) -> None:
    hall.step("predict", PLAY)
    people = [hall.come() for _ in range(3)]
    hall.step("run")
    for i, page in enumerate(people):
        me = view(page)
        body = {"round": me["round"], "seed": me["seed"], "steps": 120, "loss": [1.0, 0.5, 0.1 * (i + 1)]}
        assert say(page, "room-curve", **body) == {"kept": True}
        assert say(page, "room-curve", **body) == {"kept": False}
    assert len({view(p)["seed"] for p in people}) == 3
    assert ask(people[0], "room-wall")["wall"] is None  # before Reveal
    hall.step("reveal")
    play = ask(people[0], "room-wall")["wall"]["play"]
    assert play["count"] == 3 and "between 0.1 and 0.3; the median is 0.2" in play["say"]
    median = next(d for d in play["figure"]["data"] if d["name"] == "median")
    assert median["x"] == [0.0, 60.0, 120.0] and median["y"] == pytest.approx([1.0, 0.5, 0.2])
    sizes = [f["size"] for f in fonts(play["figure"])]
    assert len(sizes) > 4 and min(sizes) >= 20  # for the back row


def fonts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        for k, v in value.items():
            if k == "template":
                continue
            if k in ("font", "tickfont") and "size" in v:
                yield v
            yield from fonts(v)
    elif isinstance(value, list):
        for v in value:
            yield from fonts(v)


@pytest.mark.parametrize("name", ["room-step", "room-grid"])
def test_only_the_presenter_presses_keys(hall: Hall, name: str) -> None:
    page = hall.come()
    before = view(page)["version"]
    for body in ({"stage": "predict", "question": QUESTION}, {"stage": "lobby"}, {"stage": "reveal"}, {"minutes": 99}):
        assert say(page, name, **body)["error"] == "only the presenter can do that"
    assert view(page)["version"] == before
    for other in ("room-guess", "room-curve", "room-name"):
        assert "the presenter asks" in say(hall.presenter, other, name="x", round=1, choice=0)["error"]


def test_names_are_short_plain_text(hall: Hall) -> None:
    page = hall.come()
    assert say(page, "room-name", name="  <img src=x>\n ")["name"] == "<img src=x>"
    assert "at most 24" in say(page, "room-name", name="x" * 25)["error"]
    for wrong in (3, None, ["x"], {"a": 1}):
        assert "must be text" in say(page, "room-name", name=wrong)["error"]
    assert say(page, "room-name", name="")["name"] == ""


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("room-step", {"stage": ["run"]}),
        ("room-step", {"stage": "predict", "question": "rank"}),
        ("room-step", {"stage": "predict", "question": {"kind": ["card"], "name": {}}}),
        ("room-step", {"stage": "predict", "question": {"kind": "own", "text": {}, "choices": [{}, []]}}),
        ("room-grid", {"ranks": [[1]], "targets": [[["q"]]], "task": ["pirate"], "steps": 8}),
        ("room-grid", {"ranks": [1], "targets": [["q"]], "task": ["pirate"], "steps": 8}),
        ("room-grid", {"minutes": "NaN"}),
        ("room-take", {"place": [0]}),
        ("room-cancel", {"cell": {"id": 1}}),
        ("room-cancel", {}),
    ],
)
def test_what_is_of_the_wrong_kind_is_told(hall: Hall, name: str, body: dict[str, Any]) -> None:
    answer = hall.presenter.post(f"/lab/api/{name}", json=body)
    assert answer.status_code == 200 and answer.json()["error"] and "Traceback" not in answer.text


def test_cells_from_the_estimate_to_the_wall(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.pages.room.estimated", lambda lab, made: [4.0] * len(made.places))
    grid = say(hall.presenter, "room-grid", ranks=[1, 4], targets=[["q", "v"], "all"], task="pirate", steps=6,
               minutes=5, teams=0)["grid"]  # fmt: skip
    assert [(p["rank"], p["set"], p["estimate_s"]) for p in grid["places"]][:3] == [(1, "q v", 4.0), (4, "q v", 4.0),
                                                                                    (1, "all", 4.0)]  # fmt: skip
    hall.step("predict", {"kind": "card", "name": "rank", "act": "grid"})
    a, b = hall.come(), hall.come()
    say(a, "room-name", name="=cmd()")
    assert "grid" not in view(a)  # not while they guess
    assert "no cells are handed out" in say(a, "room-take", place=0)["error"]
    say(a, "room-guess", round=view(a)["round"], choice=0)
    hall.step("run")
    hand = view(a)["grid"]["places"]
    assert sum(p["dealt"] for p in hand) == 1 and hand[0]["estimate_s"] == 4.0  # the estimate comes before starting
    mine, theirs = say(a, "room-take", place=0)["cell"], say(b, "room-take", place=1)["cell"]
    assert "somebody else's" in say(b, "room-cancel", cell=mine)["error"]
    cells = {c["id"]: c for c in view(a)["grid"]["cells"]}
    assert cells[mine]["mine"] and not cells[theirs]["mine"]
    assert {c["status"] for c in cells.values()} <= {"waiting", "started"}
    until(lambda: all(c["status"] == "done" for c in view(hall.presenter)["grid"]["cells"]))
    cells = {c["id"]: c for c in view(a)["grid"]["cells"]}
    assert cells[mine]["loss"] == pytest.approx(2.7) and "loss" not in cells[theirs] and "run" not in cells[theirs]
    assert ask(a, "room-wall")["wall"] is None
    hall.step("reveal")
    wall = ask(a, "room-wall")["wall"]
    assert {r["who"]: r["guess"] for r in wall["runs"]["rows"]}["=cmd()"] == "A"
    assert wall["runs"]["say"].startswith("Best: r 4 · q v") and wall["answer"]["verdict"]
    assert wall["runs"]["front"] == [r["run"] for r in sorted(wall["runs"]["rows"], key=lambda r: r["rank"])]
    for name in ("pareto", "losses", "spectra"):
        assert min(f["size"] for f in fonts(wall["runs"][name])) >= 20
    assert "1 of 1 for r 1 · q v" in wall["runs"]["say_spectra"]
    other = {c["id"]: c for c in view(b)["grid"]["cells"]}[mine]["run"]
    assert ask(b, "run", run=other)["status"] == "done"  # anybody's run opens from the wall
    assert "error" in say(b, "stop", run=other)


def test_a_cell_of_an_earlier_question_is_still_ones_own(hall: Hall) -> None:
    hall.step("predict", {"kind": "card", "name": "rank", "act": "grid"})
    a, b = hall.come(), hall.come()
    hall.step("run")
    mine, theirs = say(a, "room-take", place=0)["cell"], say(b, "room-take", place=1)["cell"]
    hall.step("predict", QUESTION)  # before any has begun: a batch waits three seconds for others
    hall.step("run")
    grid = view(a)["grid"]
    assert [(c["id"], c["mine"], c["earlier"], c["position"]) for c in grid["cells"]] == [
        (mine, True, True, 1), (theirs, False, True, 2)]  # fmt: skip
    assert all(p["taken"] == 0 for p in grid["places"]) and grid["spent_min"] == 0
    assert "grid" not in view(hall.come())
    assert "somebody else's" in say(a, "room-cancel", cell=theirs)["error"]
    assert "error" not in say(a, "room-cancel", cell=mine)
    assert "grid" not in view(a) and [c["id"] for c in view(b)["grid"]["cells"]] == [theirs]
    until(lambda: "grid" not in view(b))  # it ran all the same, and is over


def test_the_wall_can_be_taken_along(hall: Hall) -> None:
    rows = list(csv.reader(io.StringIO(hall.presenter.get("/lab/api/room.csv").text)))
    assert rows[0][:4] == ["round", "question", "person", "what"] and {len(r) for r in rows} == {len(rows[0])}
    words = [c for r in rows for c in r]
    assert "'=cmd()" in words and "'=1+1" not in [r[5] for r in rows] and not [c for c in words if c[:1] == "="]
    answer = hall.presenter.get("/lab/api/room.ipynb")
    assert "attachment" in answer.headers["content-disposition"]
    made = json.loads(answer.text)
    import nbformat

    nbformat.validate(made)
    space: dict[str, Any] = {}
    for cell in made["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)  # noqa: S102 - our own notebook, in the test that it runs
    assert len(space["rows"]) == len(rows)
    marks = "".join("".join(c["source"]) for c in made["cells"] if c["cell_type"] == "markdown")
    assert "<b>" not in marks and "&lt;b&gt;rank" in marks
    page = hall.come()
    hall.step("predict", QUESTION)
    assert page.get("/lab/api/room.csv").status_code == 404
    hall.step("reveal")
    assert page.get("/lab/api/room.csv").status_code == 200


def test_a_restart_of_the_server_comes_back_to_the_stage(tmp_path: Path) -> None:
    keys = Keys.kept(tmp_path, room=True)
    cookies: dict[str, str] = {}
    for turn in range(2):
        store = RunStore(tmp_path, recorded=tmp_path / "nothing")
        app = create_app(store, RunQueue(store, command=STAND_IN), model=None, keys=Keys.kept(tmp_path, room=True),
                         room=open_room(store))  # fmt: skip
        with TestClient(app, base_url=BASE) as presenter:
            presenter.get(f"/lab/api/ping?key={keys.presenter}")
            page = TestClient(app, base_url=BASE, cookies=cookies)
            if turn == 0:
                page.get(f"/lab/api/ping?key={keys.participant}")
                cookies = dict(page.cookies)
                say(presenter, "room-step", stage="predict", question=QUESTION)
                say(page, "room-guess", round=view(page)["round"], choice=2)
            else:
                assert (view(page)["stage"], view(page)["guess"]) == ("predict", 2)
        store.close()


def test_the_terminal_says_how_to_let_others_in(tmp_path: Path) -> None:
    opened = open_room(RunStore(tmp_path), participants="http://127.0.0.1:7860/?key=abc")
    here = invitation(opened, True)
    assert opened.participants in here and "--host" in here and "█" not in here
    assert "█" in invitation(opened, False) and invitation(None, True) == ""
