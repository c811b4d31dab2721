"""Nobody where they do not belong: what one participant keeps here, asked for by another at every address."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.pages import api, owners, values
from app.pages.keys import Keys
from app.pages.take import FILES
from app.pages.visitor import HOST, Visitor, asked_by, asking
from app.runs.queue import RunQueue
from app.runs.run import Run, RunRequest
from app.runs.store import RunStore
from app.server import create_app
from lora_core.errors import UserError
from tests.pages_kit import BASE, FILE, SMALL, STAND_IN, model_folder

KEYS = Keys(presenter="p" * 22, participant="t" * 22)
TAG, TITLE = "xylophone", "zeppelin"  # stand in everything that is Anna's, and in what her run is called
ROWS = "".join(f"{TAG} {a} {b}||the {a} {b} {TAG}\n" for a in ("red", "blue", "green") for b in ("box", "ball", "ring"))


@dataclass
class Room:
    """A server with keys, its presenter, and two participants: what is Anna's is asked for by Bob."""

    store: RunStore
    model: str
    boss: TestClient
    anna: TestClient
    bob: TestClient
    run: Run  # Anna's, on a file of hers
    upload: str
    set: str

    def ids(self) -> dict[str, Any]:
        """Every name that an address may take, with what is Anna's, or with something that works."""
        config = {**SMALL, "steps": 2}
        data = {"file": self.upload, "name": "rows.txt"}
        return {"run": self.run.id, "other": self.run.id, "with": str(self.run.id), "open": self.set, "set": self.set,
                "file": self.upload, "data": data, "model": self.model, "m": "layers.0.q", "page": "annas", "seq": 99,
                "spec": {"targets": ["q", "v"], "rank": 2}, "config": config, "text": "a text", "prompt": "a prompt",
                "stage": "forward", "step": 1, "name": "rank", "quick": True, "tokens": 10.0, "labelled": 5.0,
                "part": "spectrum", "over": str(self.run.id), "first": "k", "holders": "1", "seed": 0,
                "max_tokens": 64, "base": None, "setting": None, "seen": "", "task": None, "light": None}  # fmt: skip

    def questions(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Every address of the page with Anna's things: (method, address, what is asked)."""
        known, found = self.ids(), []
        for method, questions in (("GET", api.GET), ("POST", api.POST)):
            for name in questions:
                table = (values.GET if method == "GET" else values.POST).get(name)
                if table is None:
                    continue
                names = [n.removesuffix("!") for n in table.split() if n != "…"]
                asked = {n: known[n] for n in names if known.get(n) is not None}
                if name == "runs":
                    asked = {"text": ""}
                if name in ("model", "weights"):
                    asked["name"] = self.model
                found.append((method, name, asked))
                if "open" in names:
                    found.append((method, name, {k: v for k, v in asked.items() if k != "open"}))
                    found.append((method, name, {**asked, "run": "0"}))
                if {"run", "data"} <= set(names):
                    found.append((method, name, {k: v for k, v in asked.items() if k != "run"}))
        found += [("GET", f"take/{name}", {"run": self.run.id}) for name in FILES]
        return [*found, ("GET", "adapter.zip", {"run": self.run.id})]


def ask(client: TestClient, method: str, name: str, asked: dict[str, Any]) -> tuple[int, str]:
    if method == "GET":
        answer = client.get(f"/lab/api/{name}", params=asked)
    else:
        answer = client.post(f"/lab/api/{name}", json=asked)
    return answer.status_code, answer.content.decode("utf-8", "replace")


def comes_in(app: Any, token: str | None) -> TestClient:
    found = TestClient(app, base_url=BASE)
    answer = found.get(f"/?key={token}", follow_redirects=False)
    assert answer.status_code == 303
    return found


def owner_of(client: TestClient) -> str:
    found = KEYS.open(client.cookies[KEYS.cookie])
    assert found is not None
    return found[0].owner


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    from app.runs.worker import run_here

    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("LORA_LAB_HOME", str(home))
        model, store = model_folder(home), RunStore(home, recorded=home / "nothing recorded")
        app = create_app(store, RunQueue(store, command=STAND_IN), model=None, keys=KEYS)
        with TestClient(app, base_url=BASE):
            boss, anna, bob = (comes_in(app, t) for t in (KEYS.presenter, KEYS.participant, KEYS.participant))
            assert ask(boss, "GET", "model", {"name": model})[0] == 200
            upload = anna.post(f"/lab/api/upload?name={TAG}.txt", content=ROWS.encode(), headers=FILE).json()["file"]
            data = home / f"{TAG}-2.txt"
            data.write_text(ROWS)
            request = RunRequest(model=model, data=str(data), spec={"targets": ["q", "v"], "rank": 4, "alpha": 8.0},
                                 config=SMALL, title=TITLE)  # fmt: skip
            done = run_here(store, store.create(request, owner=owner_of(anna)).id)
            assert done.status == "done" and done.adapter is not None, done.error
            weights = (done.adapter / "adapter_model.safetensors").read_bytes()
            sent = anna.post(f"/lab/api/open-file?name={TAG}.safetensors", content=weights, headers=FILE).json()["set"]
            opened = anna.post("/lab/api/open", json={"set": sent, "name": TAG}).json()
            assert opened == {"open": sent, "name": TAG}
            yield Room(store, model, boss, anna, bob, store.get(done.id), upload, sent)


def state(room: Room) -> tuple[Any, ...]:
    """What is Anna's, on the disk and in the store; without the losses that the server keeps beside a run."""
    home = room.store.root.parent
    folders = (home / "people" / room.run.owner, room.run.folder)
    files = sorted((str(p.relative_to(home)), p.stat().st_size) for f in folders for p in f.rglob("*") if p.is_file()
                   and "held.json" not in p.name)
    row = room.store.db.rows("SELECT id, status, owner, shared, adapter, attempts FROM runs WHERE owner = ?",
                             (room.run.owner,))  # fmt: skip
    return files, row


def test_every_address_keeps_annas_things_from_bob(room: Room) -> None:
    before, hers = state(room), 0
    for method, name, asked in room.questions():
        status, text = ask(room.bob, method, name, asked)
        assert TAG not in text and TITLE not in text, (name, asked, text[:300])
        assert status < 500, (name, text[:300])
    assert state(room) == before
    assert json.loads(ask(room.bob, "GET", "runs", {"text": TAG})[1])["total"] == 0
    for method, name, asked in room.questions():  # the same from Anna: without it, nothing above could fail
        if method == "GET":
            hers += TAG in ask(room.anna, method, name, asked)[1]
    assert hers >= 6
    assert room.store.list(10, owner=owner_of(room.bob)) == []


def test_what_is_not_ones_own_is_told_like_what_is_not_there(room: Room) -> None:
    _, other = ask(room.bob, "GET", "run", {"run": room.run.id})
    _, none = ask(room.bob, "GET", "run", {"run": 999})
    assert other.replace(str(room.run.id), "999") == none


def test_the_hosts_runs_are_not_the_rooms(room: Room) -> None:
    hers = room.store.create(RunRequest(model=room.model, task="pirate", title=TITLE))
    try:
        for method, name, more in (("GET", "run", {}), ("GET", "form", {}), ("GET", "film", {}), ("POST", "stop", {}),
                                   ("POST", "resume", {}), ("GET", "sides", {}), ("GET", "pareto", {})):  # fmt: skip
            _, text = ask(room.bob, method, name, {"run": hers.id, **more})
            assert "that you may see" in text and TITLE not in text, (name, text)
        assert hers.id not in [r["id"] for r in json.loads(ask(room.bob, "GET", "runs", {})[1])["runs"]]
        assert room.store.get(hers.id).status == "queued"
    finally:
        room.store.delete(hers.id)


def test_bob_changes_nothing_of_annas_even_when_it_is_shared(room: Room) -> None:
    room.store.share(room.run.id)
    try:
        seen = json.loads(ask(room.bob, "GET", "run", {"run": room.run.id})[1])
        assert seen["status"] == "done" and seen["loss"] is not None and TAG not in json.dumps(seen)
        assert room.run.id in [r["id"] for r in json.loads(ask(room.bob, "GET", "runs", {})[1])["runs"]]
        assert "measures" in json.loads(ask(room.bob, "GET", "heat", {"run": room.run.id})[1])
        total = {c: json.loads(ask(c, "GET", "runs", {"text": TAG})[1])["total"] for c in (room.bob, room.anna)}
        assert total == {room.bob: 0, room.anna: 1}  # a search tells no name that is not shown
        before = state(room)
        for method, name, asked in room.questions():
            status, text = ask(room.bob, method, name, asked)
            assert TAG not in text and status < 500, (name, asked, text[:300])
        for name in ("stop", "resume", "merge", "cut"):
            assert "error" in json.loads(ask(room.bob, "POST", name, {"run": room.run.id})[1]), name
        for name in ("adapter.zip", *(f"take/{n}" for n in FILES)):
            assert "is not yours" in ask(room.bob, "GET", name, {"run": room.run.id})[1], name
        assert state(room) == before
        assert ask(room.anna, "GET", "adapter.zip", {"run": room.run.id})[1][:2] == "PK"
        merged = ask(room.anna, "POST", "merge", {"run": room.run.id})[1]
        whole = room.anna.get("/lab/api/take/merged.zip", params={"run": room.run.id})
        part = room.anna.get("/lab/api/take/merged.zip", params={"run": room.run.id}, headers={"range": "bytes=0-3"})
        assert json.loads(merged)["bytes"] == len(whole.content) and part.content == whole.content[:4]
        assert part.status_code == 206 and room.anna.cookies[KEYS.cookie] not in str(part.headers)
        many = {"range": "bytes=" + ",".join(f"{i}-{i}" for i in range(2000))}
        assert room.anna.get("/lab/api/take/merged.zip", params={"run": room.run.id}, headers=many).status_code == 200
        assert "is not yours" in ask(room.bob, "GET", "take/merged.zip", {"run": room.run.id})[1]
    finally:
        room.store.share(room.run.id, False)


def test_texts_are_written_for_whoever_may_read_the_run(room: Room) -> None:
    asked = {"run": room.run.id, "prompt": "a", "page": "x", "seq": 1}

    def written(client: TestClient, hash: str) -> str:
        body = {"data": [asked], "fn_index": 0, "session_hash": hash, "trigger_id": None, "event_data": None}
        assert client.post("/gradio_api/queue/join", json=body).status_code == 200
        return client.get("/gradio_api/queue/data", params={"session_hash": hash}).text

    assert "that you may see" in written(room.bob, "bobs0000001")
    assert '"done":true' in (hers := written(room.anna, "annas000001")) and "that you may see" not in hers
    join = {"data": [asked], "fn_index": 0, "session_hash": "annas000001"}
    assert room.bob.post("/gradio_api/queue/join", json=join).status_code == 403
    assert room.bob.get("/gradio_api/queue/data?session_hash=annas000001").status_code == 403
    assert room.bob.get("/gradio_api/heartbeat/annas000001").status_code == 403
    cancel = {"session_hash": "annas000001", "fn_index": 0, "event_id": "x"}
    assert room.bob.post("/gradio_api/cancel", json=cancel).status_code == 403


def test_one_page_does_not_end_the_question_of_another(room: Room) -> None:
    who = [Visitor(role="participant", owner=owner) for owner in "ab"]
    names = []
    for one in who:
        token = asking.set(one)
        names.append(owners.page("the same"))
        asking.reset(token)
    assert names[0] != names[1] != owners.page("the same")


def test_the_model_and_the_experiments_are_the_presenters(room: Room, tmp_path: Path) -> None:
    for name in ("minilm", "/etc", "smollm2-360m"):
        assert "the presenter chooses the model" in ask(room.bob, "GET", "model", {"name": name})[1]
    body = {"model": "gpt2", "spec": {}, "config": {"steps": 2}, "data": {"task": "pirate"}}
    assert "the presenter chooses" in ask(room.bob, "POST", "train", body)[1]
    assert "presenter" in ask(room.bob, "POST", "experiment", {"name": "rank", "quick": True})[1]
    assert "presenter" in ask(room.bob, "POST", "experiment-stop", {"name": "rank"})[1]
    boot = json.loads(ask(room.bob, "GET", "boot", {})[1])
    assert boot["facts"]["name"] == room.model and not boot["fault"]


def test_a_participant_has_a_share_of_the_queue_and_no_more(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"model": room.model, "spec": {"targets": ["v"], "rank": 2}, "config": {"steps": 301, "max_tokens": 64},
            "data": {"task": "sentiment"}}  # fmt: skip
    assert "in a room it is at most 300" in ask(room.bob, "POST", "train", body)[1]
    step = {**body, "config": {"batch_size": 17}, "page": "p", "stage": "forward", "step": 1}
    assert "batch_size is 17; in a room" in ask(room.bob, "POST", "walk", step)[1]
    who = Visitor(role="participant", owner="someone")
    waiting = [room.store.create(RunRequest(model="m", task="pirate"), owner="someone") for _ in range(3)]
    token = asking.set(who)
    try:
        with pytest.raises(UserError, match="3 runs of yours wait"):
            owners.may_begin(room.store)
        assert owners.may_keep(room.store) is None
        monkeypatch.setattr(owners, "MOST_RUNS", 3)
        with pytest.raises(UserError, match="you have 3 runs"):
            owners.may_keep(room.store)
    finally:
        asking.reset(token)
        for run in waiting:
            room.store.delete(run.id)
    owners.may_begin(room.store, {"steps": 10**6})  # the host's own machine


def test_the_presenter_sees_all(room: Room) -> None:
    assert TAG in ask(room.boss, "GET", "run", {"run": room.run.id})[1]
    assert room.run.id in [r["id"] for r in json.loads(ask(room.boss, "GET", "runs", {})[1])["runs"]]
    assert room.boss.get("/lab/api/adapter.zip", params={"run": room.run.id}).content[:2] == b"PK"


def test_a_strangers_file_names_no_folder_of_this_machine(room: Room) -> None:
    token = asking.set(Visitor(role="participant", owner="a"))
    try:
        assert owners.may_name(room.model) is None and owners.may_name("../../x") is None
        assert owners.may_name("smollm2-135m") == "smollm2-135m"
    finally:
        asking.reset(token)
    assert owners.may_name(room.model) == room.model


def test_uploads_have_a_quota_for_each_person(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    monkeypatch.setattr(owners, "THEIRS", replace(owners.THEIRS, files=2, bytes=40))
    send = lambda body: room.bob.post("/lab/api/upload?name=b.txt", content=body, headers=FILE).json()  # noqa: E731
    assert "file" in send(b"a||b\n")
    assert "together" in send(b"x" * 50)["error"]
    assert "file" in send(b"a||b\n")
    assert "at most 2 are kept" in send(b"a||b\n")["error"]
    assert "file" in room.boss.post("/lab/api/upload?name=b.txt", content=b"a||b\n", headers=FILE).json()


def test_no_page_goes_to_the_store_past_the_one_place_that_decides() -> None:
    """What a page asks or changes of a run, it asks of `Lab` and `owners`."""
    kept = {"get", "list", "count", "delete", "share", "enqueue", "ask_to_stop"}
    for file in Path(owners.__file__).parent.glob("*.py"):
        text = file.read_text().replace("lab.store.delete(new.id)", "None")  # a cut that failed takes its own run back
        for node in ast.walk(ast.parse(text)):
            f = node.func if isinstance(node, ast.Call) else None
            if isinstance(f, ast.Attribute) and ast.unparse(f.value).endswith("store"):
                assert f.attr not in kept or file.name in ("owners.py", "wall.py"), (file.name, f.attr)
                assert f.attr != "create" or "owner" in [k.arg for k in node.keywords], file.name  # type: ignore


def test_answers_made_elsewhere_are_made_for_whoever_asked() -> None:
    def answers() -> Iterator[Visitor]:
        try:
            while True:
                yield asking.get()
        finally:
            seen.append(asking.get())

    seen: list[Visitor] = []
    who = Visitor(role="participant", owner="a")
    made = asked_by(who, answers())
    assert [next(made), next(made)] == [who, who] and asking.get() == HOST
    made.close()  # type: ignore[attr-defined]
    assert seen == [who]
