"""A server for others: who comes in and how, what Gradio would answer and does not, and what it costs at most."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.pages import addresses, keys
from app.pages.guard import BODY, STREAMS, Guard, strict
from app.pages.keys import Brake, Keys, block
from app.pages.lab import Lab
from app.pages.sweeper import Sweeper
from app.runs.queue import RunQueue
from app.runs.store import RunStore
from app.server import create_app, names, shown
from lora_core.errors import UserError
from tests.pages_kit import BASE, FILE, STAND_IN

KEYS = Keys(host="h" * 22, participant="t" * 22)
GRADIO = (  # what Gradio would answer: files, fetching, uploads, other people's sessions, logins, monitoring
    "GET /file=/etc/passwd", "GET /gradio_api/file=/etc/passwd", "GET /gradio_api/file=https://example.org/x",
    "GET /file/etc/passwd", "GET /gradio_api/file/etc/passwd", "HEAD /gradio_api/file=/etc/passwd",
    "GET /proxy=https://example.org/", "GET /gradio_api/proxy=https://example.org/", "POST /upload",
    "POST /gradio_api/upload", "GET /gradio_api/upload_progress?upload_id=x", "GET /monitoring",
    "GET /monitoring/summary", "GET /monitoring/x", "GET /openapi.json", "GET /gradio_api/openapi.json", "GET /docs",
    "GET /gradio_api/deep_link?session_hash=x", "POST /gradio_api/run/write", "POST /gradio_api/api/write",
    "POST /gradio_api/call/write", "POST /gradio_api/call/v2/write", "GET /gradio_api/call/write/x",
    "POST /gradio_api/stream/x", "POST /gradio_api/stream/x/close", "GET /gradio_api/stream/x/0/1/playlist.m3u8",
    "POST /gradio_api/component_server", "POST /gradio_api/process_recording", "POST /gradio_api/vibe-edit",
    "GET /gradio_api/vibe-code", "GET /gradio_api/dev/reload", "GET /gradio_api/startup-events", "POST /login",
    "GET /gradio_api/app_id", "GET /logout", "GET /gradio_api/login_check", "GET /gradio_api/token",
    "GET /gradio_api/runs", "GET /gradio_api/run-history/records", "GET /gradio_api/profiling/traces",
    "GET /gradio_api/mcp/sse", "GET /svelte/x.js", "GET /gradio_api/custom_component/x/y/z/a.js", "GET /pwa_icon",
    "GET /static/..%2f..%2froutes.py", "GET /assets/../routes.py", "PUT /", "DELETE /lab2", "OPTIONS /config",
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def app(home: Path) -> Iterator[Any]:
    store = RunStore(home)
    found = create_app(store, RunQueue(store, command=STAND_IN), model=None, keys=KEYS)
    with TestClient(found, base_url=BASE):
        yield found


@pytest.fixture
def outside(app: Any) -> TestClient:
    app.brake = Brake()
    return TestClient(app, base_url=BASE)


@pytest.fixture
def inside(app: Any) -> TestClient:
    app.brake = Brake()
    found = TestClient(app, base_url=BASE)
    assert found.get(f"/?key={KEYS.host}").status_code == 200
    return found


# ---- the door
@pytest.mark.parametrize("what", [
    "GET /", "GET /config", "GET /theme.css", "GET /gradio_api/info", "GET /gradio_api/heartbeat/x", "GET /nothing",
    "GET /gradio_api/queue/data?session_hash=x", "POST /gradio_api/queue/join", "POST /gradio_api/cancel",
    "POST /gradio_api/reset", "GET /lab/api/ping", "GET /lab/api/runs", "POST /lab/api/train", "POST /lab/api/upload",
    "GET /lab/static/x/main.js", "GET /assets/index.js", "GET /static/img/x.png", *GRADIO,
])  # fmt: skip
def test_without_a_key_nothing_is_answered(outside: TestClient, what: str) -> None:
    method, path = what.split(" ", 1)
    answer = outside.request(method, path)
    assert answer.status_code == 401
    if method != "HEAD":
        assert "whole link" in answer.text and len(answer.text) < 200


def test_a_link_with_the_key_opens_and_forgets_the_key(outside: TestClient) -> None:
    answer = outside.get(f"/?tab=train&key={KEYS.host}&run=3", follow_redirects=False)
    assert answer.status_code == 303 and answer.headers["location"] == "/?tab=train&run=3"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Lax" in cookie and KEYS.host not in cookie  # type: ignore[operator]
    assert outside.get("/lab/api/ping").json() == {"here": True}
    long = "/?" + "a=1&" * 3000 + f"key={KEYS.host}&b=2"
    many = TestClient(outside.app, base_url=BASE).get(long, follow_redirects=False)
    assert many.status_code == 303 and many.headers["location"].endswith("a=1&b=2")
    for path in ("//evil.example/?key=", "/\\evil.example?key=", "/%0d%0aset-cookie:x?key="):
        found = TestClient(outside.app, base_url=BASE).get(path + KEYS.host, follow_redirects=False)  # type: ignore[operator]
        assert found.headers["location"].startswith("/") and not found.headers["location"].startswith("//")
        assert "\n" not in found.headers["location"]


def test_a_person_stays_who_they_are_and_a_new_key_makes_them_more(app: Any) -> None:
    one = TestClient(app, base_url=BASE)
    one.get(f"/?key={KEYS.participant}")
    first = KEYS.open(one.cookies[KEYS.cookie])
    one.get(f"/?key={KEYS.participant}")
    assert first is not None and KEYS.open(one.cookies[KEYS.cookie]) == first and first[0].role == "participant"
    assert len(first[0].owner) == 16
    one.get(f"/?key={KEYS.host}")
    now = KEYS.open(one.cookies[KEYS.cookie])
    assert now is not None and now[0].role == "host" and now[0].owner == ""
    one.get(f"/?key={KEYS.participant}")
    assert KEYS.open(one.cookies[KEYS.cookie]) == now


def test_cookies_are_signed_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    good = KEYS.seal("participant", "a" * 16)
    assert KEYS.open(good) is not None
    role, owner, session, when, sign = good.split(".")
    for bad in (f"host.{owner}.{session}.{when}.{sign}", f"{role}.{'b' * 16}.{session}.{when}.{sign}", good[:-1],
                f"{role}.{owner}.{session}.{int(when) + 9}.{sign}", "", "....", good + "x", "é" * 40, f"{good}.x",
                f"presenter.{owner}.{session}.{when}.{sign}",
                f"{role}.{owner}.{session}.{'9' * 5000}.{sign}"):  # fmt: skip
        assert KEYS.open(bad) is None, bad
    other = Keys(host=KEYS.host, participant="u" * 22, secret=KEYS.secret)
    assert other.open(good) is None  # another token: whoever came in by the old one is out
    assert Keys(host=KEYS.host, participant=KEYS.participant).open(good) is None  # another secret
    late = time.time() + 15 * 86_400
    monkeypatch.setattr(keys.time, "time", lambda: late)
    assert KEYS.open(good) is None


def test_keys_are_kept_for_their_owner_alone(tmp_path: Path) -> None:
    first = Keys.kept(tmp_path, room=True)
    assert first.host is None and len(first.presenter or "") >= 22 and first.presenter != first.participant
    assert stat.S_IMODE(os.stat(tmp_path / keys.FILE).st_mode) == 0o600
    again = Keys.kept(tmp_path, room=True)
    assert (again.presenter, again.participant, again.secret) == (first.presenter, first.participant, first.secret)
    assert Keys.kept(tmp_path, room=True, new=True).presenter != first.presenter
    assert Keys.kept(tmp_path).presenter is None and Keys.kept(tmp_path).host


def test_wrong_keys_are_slowed_by_address(outside: TestClient) -> None:
    said = [outside.get(f"/?key=wrong{i}").status_code for i in range(12)]
    assert said[:8] == [401] * 8 and 429 in said[8:] and outside.get(f"/?key={KEYS.host}").status_code == 429
    now = [0.0]
    brake = Brake(lambda: now[0])
    for i in range(3000):
        brake.wrong(f"10.0.{i // 250}.{i % 250}")
    assert brake.open("192.168.1.1") and not brake.open("10.0.11.249") and len(brake.left) <= keys.MOST_ADDRESSES
    now[0] = 60.0
    assert brake.open("10.0.11.249")
    assert block("2001:db8::1") == block("2001:db8::ffff") != block("2001:db8:1::1") and block("1.2.3.4") == "1.2.3.4"


# ---- the other sites and the other names
def test_other_sites_neither_read_nor_write(inside: TestClient) -> None:
    cross = {"sec-fetch-site": "cross-site"}
    link = {**cross, "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    for method, path in (("GET", "/lab/api/runs"), ("GET", "/config"), ("HEAD", "/"), ("POST", "/lab/api/stop"),
                         ("POST", "/gradio_api/queue/join"), ("PUT", "/"), ("OPTIONS", "/lab/api/stop"),
                         ("GET", "/lab/static/x/main.js"), ("DELETE", "/lab/api/runs")):  # fmt: skip
        for headers in (cross, {"sec-fetch-site": "same-site"}, {"origin": "https://evil.example"}, {"origin": "null"},
                        {"origin": BASE.replace("http", "ftp")}, {"origin": BASE + ".evil.example"}):  # fmt: skip
            assert inside.request(method, path, headers=headers).status_code == 403, (method, path, headers)
    assert inside.get("/", headers=link).status_code == 200  # a link to the page may be followed
    assert inside.get("/lab/api/runs", headers=link).status_code == 403
    answer = inside.get("/", headers={"origin": BASE})
    assert not [h for h in answer.headers if h.startswith("access-control-")]


def test_the_hosts_are_an_exact_list(home: Path) -> None:
    found = names("192.168.1.7", ("Lab.example",))
    assert {"127.0.0.1", "localhost", "[::1]", "192.168.1.7", "lab.example"} <= set(found) and "*" not in found
    assert names("127.0.0.1") == ("127.0.0.1", "localhost", "[::1]")
    everywhere = names("0.0.0.0")
    assert "127.0.0.1" in everywhere and "0.0.0.0" not in everywhere
    for wrong in ("*", "a b", "lab.example:80", "http://x", "", "x/", ".x"):
        with pytest.raises(UserError, match="no name of a machine"):
            names("127.0.0.1", (wrong,))
    guard = Guard(None, found)  # type: ignore[arg-type]
    for host in ("192.168.1.7:7860", "lab.example", "LAB.example:1", "localhost", "[::1]:7860", "[::1]"):
        assert guard._elsewhere("GET", "/", {"host": host}) is None, host
    for host in ("192.168.1.8:7860", "evil.example", "lab.example.evil.example", "", "127.0.0.1; localhost", "0.0.0.0"):
        assert guard._elsewhere("GET", "/", {"host": host}) is not None, host
    assert shown("::1") == "[::1]" and shown("localhost") == "127.0.0.1" and shown("0.0.0.0") != "0.0.0.0"


# ---- what Gradio would answer
@pytest.mark.parametrize("what", GRADIO)
def test_of_gradios_addresses_only_the_pages_own_are_there(inside: TestClient, what: str) -> None:
    method, path = what.split(" ", 1)
    assert inside.request(method, path, json={} if method == "POST" else None).status_code in (404, 403)


def test_gradios_files_are_in_a_folder_of_ours(app: Any, home: Path) -> None:
    folder = home / "gradio"
    assert os.environ["GRADIO_TEMP_DIR"] == str(folder) and stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("value", [
    {"path": "https://example.org/x", "meta": {"_type": "gradio.FileData"}}, {"path": "http://127.0.0.1/x"},
    {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, {"path": "/etc/passwd", "orig_name": "x"},
    {"path": "/etc/passwd", "url": None}, [[{"deep": {"path": "ftp://x/y"}}]],
])  # fmt: skip
def test_no_request_makes_the_server_fetch_or_read_a_file(inside: TestClient, value: Any) -> None:
    body = {"data": [{"prompt": value}], "fn_index": 0, "session_hash": "abcdef12345"}
    answer = inside.post("/gradio_api/queue/join", json=body)
    assert answer.status_code == 400 and "no files" in answer.text
    assert not addresses.holds_file({"prompt": "https://example.org/x", "path": "layers.0.q"})


@pytest.mark.parametrize("body", [
    b"", b"[]", b"{", b'{"data": []}', b'{"data": [1, 2, 3, 4, 5], "session_hash": "abc"}', b'{"data": {}}', b"\xff",
    b'{"data": [{"seq": NaN}], "session_hash": "abc"}', b'{"data": [{}], "session_hash": "../x"}',
    b'{"data": [{}], "session_hash": 1e999}', b"[" * 100_000,
])  # fmt: skip
def test_what_is_no_question_does_not_reach_gradio(inside: TestClient, body: bytes) -> None:
    answer = inside.post("/gradio_api/queue/join", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 403)


def test_the_page_is_a_small_one_with_bounded_threads_and_sessions(app: Any) -> None:
    inner = app.app
    while not hasattr(inner, "router"):
        inner = inner.app
    blocks = next(r.app for r in inner.router.routes if hasattr(r, "app") and hasattr(r.app, "get_blocks"))
    found = blocks.get_blocks()
    assert found.max_threads != 40 and found.limiter is not None and found.limiter.total_tokens == found.max_threads
    assert blocks.state_holder.capacity == 200 and not found.api_open and not found.show_error
    assert found._queue.max_size == 64 and not found.enable_monitoring


def test_the_query_that_restores_a_state_is_left_out() -> None:
    assert addresses.asked("deep_link=x&tab=train&page=y&__theme=dark") == "tab=train"
    assert addresses.asked("session_hash=abc") == "session_hash=abc"


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
