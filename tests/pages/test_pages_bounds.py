"""A server for others: what a body, a value and a file may be at most, and that leftovers go."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.pages import addresses, keys
from app.pages.guard import BODY, STREAMS, strict
from app.pages.lab import Lab
from app.pages.sweeper import Sweeper
from app.runs.queue import RunQueue
from app.runs.store import RunStore
from app.server import names
from lora_core.errors import UserError
from tests.pages_kit import BASE, FILE, KEYS, STAND_IN


# ---- bodies, answers
def test_bodies_are_counted_whatever_they_say_of_themselves(inside: TestClient) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(4):
            yield b" " * (BODY // 2)

    kind = {"content-type": "application/json"}
    for path in ("/lab/api/stop", "/gradio_api/queue/join"):
        assert inside.post(path, content=pieces(), headers=kind).status_code == 413
        assert inside.post(path, content=b"{}", headers={**kind, "content-length": "3000000"}).status_code == 413
    assert inside.post("/lab/api/stop", content=b"{}", headers={**kind, "content-length": "1e9"}).status_code == 413
    huge = inside.post("/lab/api/upload?name=a.txt", content=b"x", headers={**FILE, "content-length": str(66 << 20)})
    assert huge.status_code == 413


def test_a_body_that_does_not_come_on_is_let_go(monkeypatch: pytest.MonkeyPatch, app: Any) -> None:
    import anyio

    from app.pages import guard

    monkeypatch.setattr(guard, "SLOW_S", 0.05)
    sent: list[Any] = []
    scope = {"type": "http", "method": "POST", "path": "/lab/api/stop", "query_string": b"", "client": ("x", 1),
             "headers": [(b"host", b"localhost"), (b"content-type", b"application/json"),
                         (b"cookie", f"{KEYS.cookie}={KEYS.seal('host')}".encode())]}  # fmt: skip

    async def main() -> None:
        async def receive() -> Any:
            await anyio.sleep(60)

        async def send(message: Any) -> None:
            sent.append(message)

        with anyio.fail_after(10):
            await app(scope, receive, send)

    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        pool.submit(anyio.run, main).result()
    assert sent[0]["status"] == 413


def test_a_range_is_answered_without_what_was_asked_with(inside: TestClient) -> None:
    secret = inside.cookies[KEYS.cookie]
    for path in ("/favicon.ico", "/theme.css", "/static/img/logo.svg", "/lab/static/x/main.js"):
        answer = inside.get(path, headers={"range": "bytes=0-3", "x-own": "echo-me"})
        assert secret not in str(answer.headers) and "echo-me" not in str(answer.headers)
        assert answer.status_code != 206


def test_one_visitor_has_so_many_questions_open_and_no_more(app: Any, inside: TestClient) -> None:
    found = KEYS.open(inside.cookies[KEYS.cookie])
    assert found is not None
    app.open[found[1]] = STREAMS
    assert inside.get("/lab/api/ping").status_code == 429
    del app.open[found[1]]
    assert inside.get("/lab/api/ping").status_code == 200 and found[1] not in app.open


def test_sessions_belong_to_whoever_used_them_first() -> None:
    tied = addresses.Tied()
    assert tied.mine("a", "one") and tied.mine("a", "one") and not tied.mine("b", "one")
    assert not tied.mine("a", "../x") and not tied.mine("a", None) and not tied.mine("a", "x" * 65)
    for i in range(200):
        tied.mine("b", f"flood{i}")
    assert not tied.mine("b", "one") and len(tied.known["b"]) == addresses.MOST_HASHES
    assert len(tied.of) <= addresses.MOST_HASHES + 1


def test_websockets_are_refused(inside: TestClient) -> None:
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect), inside.websocket_connect("/gradio_api/queue/join"):
        pass


# ---- values
@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": Infinity}', '{"a": -Infinity}', '{"a": 1e999}', "[[[-1e400]]]"])
def test_numbers_that_are_not_finite_are_no_json(inside: TestClient, text: str) -> None:
    with pytest.raises(ValueError, match="no finite number"):
        strict(text.encode())
    answer = inside.post("/lab/api/budget", content=text, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "finite" in answer.json()["error"]


@pytest.mark.parametrize(("method", "name", "given", "said"), [
    ("GET", "film", {}, "run is missing"),
    ("GET", "film", {"run": "1", "extra": "x"}, "no value 'extra' is expected by 'film'; possible: run m"),
    ("GET", "opened", {"x": "1"}, "possible: none at all"),
    ("GET", "heat", {"open": "x" * 401}, "401 characters"),
    ("GET", "take/curve.csv", {"run": "1", "path": "../x"}, "no value 'path'"),
    ("GET", "adapter.zip", {}, "run is missing"),
    ("POST", "experiment", {"name": "rank", "quick": 1}, "quick is 1; true or false"),
    ("POST", "experiment", {"name": "rank"}, "quick is missing"),
    ("POST", "budget", {"model": True}, "model is True; a short text"),
    ("POST", "budget", {"model": "m", "seq": True}, "seq is True; a whole number"),
    ("POST", "budget", {"model": "m", "seq": 1e300}, "a whole number"),
    ("POST", "budget", {"model": "m", "tokens": "1"}, "tokens is '1'; a finite number"),
    ("POST", "train", {"model": "m", "spec": [1]}, "an object with its settings"),
    ("POST", "stop", {"run": 1, "id": 2}, "no value 'id'"),
    ("POST", "speaks", {"run": 1, "text": "x" * 90_000}, "that is too long"),
])  # fmt: skip
def test_what_an_address_does_not_take_is_told(inside: TestClient, method: str, name: str, given: Any,
                                               said: str) -> None:  # fmt: skip
    answer = (inside.get(f"/lab/api/{name}", params=given) if method == "GET"
              else inside.post(f"/lab/api/{name}", json=given))  # fmt: skip
    assert said in answer.json()["error"] and answer.status_code < 500


def test_every_address_has_its_values(inside: TestClient) -> None:
    """Of all addresses: junk is told in a sentence, and nothing breaks."""
    from app.pages import api

    junk: list[dict[str, Any]] = [{}, {"run": True}, {"run": []}, {"run": 1e300}, {"run": {"a": 1}}, {"run": -1}]
    junk += [{"run": "0", "other": None, "seq": "x"}, {"name": 3, "model": [], "page": {}}]
    for name in api.POST:
        for body in junk:
            answer = inside.post(f"/lab/api/{name}", json=body)
            assert answer.status_code < 500 and "Traceback" not in answer.text, (name, body, answer.text)
    for name in api.GET:
        for query in ({}, {"run": "9" * 30}, {"run": "x\0y"}, {"m": "../../x", "run": "0"}, {"open": "../x", "m": "x"}):
            if name not in ("boot", "model", "data", "form"):  # those load a model
                answer = inside.get(f"/lab/api/{name}", params=query)
                assert answer.status_code < 500 and "Traceback" not in answer.text, (name, query, answer.text)


# ---- what is left
def test_leftovers_go_at_the_start_and_each_minute(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    from app.pages.session import ModelSession
    from app.pages.uploads import Uploads
    from app.runs.experiments import ExperimentRunner

    lab = Lab(store=store, queue=RunQueue(store, command=STAND_IN), session=ModelSession(), uploads=Uploads(tmp_path),
              experiments=ExperimentRunner(tmp_path))  # fmt: skip
    person = tmp_path / "people" / "0123456789abcdef"
    old = [tmp_path / "gradio" / "x" / "a.wav", tmp_path / "uploads" / ("a" * 16) / ".part",
           person / "uploads" / ("b" * 16) / "rows.txt", person / "opened" / ("c" * 16) / "files" / "a.safetensors",
           tmp_path / "take" / "run-1-merged.part", store.root / ".new-1" / "data.txt"]  # fmt: skip
    fresh = [tmp_path / "gradio" / "y" / "b.wav", tmp_path / "uploads" / ("d" * 16) / "rows.txt",
             tmp_path / "take" / "run-2-merged.zip"]  # fmt: skip
    for path in (*old, *fresh):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    for path in old:
        for place in (path, path.parent):
            if place != tmp_path / "take":
                os.utime(place, (1, 1))
    sweeper = Sweeper(lab, every_s=0.05)
    sweeper.boot()
    try:
        assert not any(p.exists() for p in old) and all(p.exists() for p in fresh) and not person.exists()
        fresh[0].parent.touch()
        os.utime(fresh[0].parent, (1, 1))
        until = time.monotonic() + 10
        while fresh[0].exists() and time.monotonic() < until:
            time.sleep(0.02)
        assert not fresh[0].exists()
    finally:
        sweeper.close()


def test_after_a_full_disk_uploads_go_on(inside: TestClient, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.open

    def full(file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        found = real(file, mode, *more, **named)
        if "w" in mode and "uploads" in str(file):
            found.write(b"half")
            found.close()
            raise OSError(28, "No space left on device")
        return found

    monkeypatch.setattr(builtins, "open", full)
    answer = inside.post("/lab/api/upload?name=a.txt", content=b"a||b\n", headers=FILE).json()
    assert "the disk is full" in answer["error"]
    monkeypatch.undo()
    assert not list((home / "uploads").glob("*"))
    assert "file" in inside.post("/lab/api/upload?name=a.txt", content=b"a||b\n", headers=FILE).json()


def test_participants_never_fill_the_disk(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from app.pages import owners

    guest = TestClient(app, base_url=BASE)
    guest.get(f"/?key={KEYS.participant}")
    send = lambda: guest.post("/lab/api/upload?name=a.txt", content=b"a||b\n", headers=FILE).json()  # noqa: E731
    assert "file" in send()
    monkeypatch.setattr(owners, "FREE_BYTES", 1 << 60)
    assert "no room for more files" in send()["error"]
    monkeypatch.undo()
    owners.crowd(owners.ALL_BYTES + 1)
    assert "no room for more files" in send()["error"]
    owners.crowd(0)
    assert "file" in send()


def test_the_command_serves_others_only_with_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    import uvicorn

    from app import server

    made: list[Any] = []

    class Stopped:
        started = should_exit = True

        def __init__(self, config: Any) -> None:
            made.append(config)

        def run(self, sockets: Any) -> None:
            time.sleep(0.3)

    monkeypatch.setenv("LORA_LAB_HOME", str(tmp_path))
    monkeypatch.setattr(uvicorn, "Server", Stopped)
    monkeypatch.setattr(server, "tell", lambda _, address, *more: made.append(address))
    server.serve("127.0.0.2", 0, open_browser=False, allow=("lab.example",))
    config, address = made
    told = json.loads((tmp_path / keys.FILE).read_text())
    assert config.app.keys.host == told["host"] and address.endswith(f"/?key={told['host']}")
    assert address.startswith("http://127.0.0.2:") and {"127.0.0.2", "lab.example"} <= set(config.app.hosts)
    assert config.limit_concurrency and not config.proxy_headers and "without encryption" in capsys.readouterr().err
    made.clear()
    server.serve("127.0.0.1", 0, open_browser=False)
    assert made[0].app.keys is None and made[0].app.hosts == names("127.0.0.1") and "key" not in made[1]


# ---- models from strangers
def test_a_long_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    from lora_core.foreign import open_any
    from lora_core.peft_format import read_tensors
    from lora_core.weights import MAX_HEADER

    assert MAX_HEADER == 1 << 20
    length = MAX_HEADER + 8
    text = b'{"__metadata__": {"a": "' + b"x" * (length - 28) + b'"}}  '
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + text.ljust(length)[:length])
    for read in (open_any, read_tensors):
        began = time.perf_counter()
        with pytest.raises(UserError, match="header claims"):
            read(path)
        assert time.perf_counter() - began < 1


def test_a_zip_is_bounded_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile
    from dataclasses import replace

    from app.pages import owners
    from app.pages.opened import bounded

    bomb, many = tmp_path / "bomb.zip", tmp_path / "many.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("adapter_model.safetensors", b"\0" * (3 << 20))
    bounded(bomb)
    monkeypatch.setattr(owners, "MINE", replace(owners.MINE, set_bytes=2 << 20))
    with pytest.raises(UserError, match="unpacks to 3 MiB; one adapter may have 2"):
        bounded(bomb)
    with zipfile.ZipFile(many, "w") as z:
        for i in range(22_000):
            z.writestr(f"{i}", b"")
    with pytest.raises(UserError, match="more members"):
        bounded(many)
    (tmp_path / "no.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(UserError, match="cannot be unpacked"):
        bounded(tmp_path / "no.zip")
