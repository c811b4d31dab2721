"""A server for others: who comes in and how, what Gradio would answer and does not, and what it costs at most."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.pages import addresses, keys
from app.pages.guard import Guard
from app.pages.keys import Brake, Keys, block
from app.server import names, shown
from lora_core.errors import UserError
from tests.pages_kit import BASE, KEYS

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
