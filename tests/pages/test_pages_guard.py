"""Who may talk to the server, what it serves, and what it takes in."""

from __future__ import annotations

import gzip
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.pages.assets import Assets, brotli
from app.pages.guard import BODY, POLICY
from app.pages.uploads import Uploads, safe_name
from app.runs.store import RunStore
from app.server import listen
from lora_core.errors import UserError
from tests.pages_kit import BASE, FILE, client

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with client(RunStore(tmp_path_factory.mktemp("home"))) as found:
        yield found


def test_the_page_and_the_rules_that_come_with_it(page: TestClient) -> None:
    answer = page.get("/")
    assert answer.status_code == 200 and "LoRA Lab" in answer.text
    assert answer.headers["content-security-policy"] == POLICY
    assert "http:" not in POLICY and "*" not in POLICY  # no other machine
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'none'" in POLICY


@pytest.mark.parametrize("path", ["/", "/lab/api/ping", "/lab/api/nothing", "/theme.css", "/gradio_api/info"])
def test_every_answer_has_the_policy(page: TestClient, path: str) -> None:
    assert page.get(path).headers["content-security-policy"] == POLICY


@pytest.mark.parametrize("path", ["/openapi.json", "/docs", "/redoc", "/monitoring", "/lab/api/nothing"])
def test_what_nobody_needs_is_not_there(page: TestClient, path: str) -> None:
    assert page.get(path).status_code in (403, 404)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:7860", ""])
def test_another_host_is_refused(page: TestClient, host: str) -> None:
    assert page.get("/", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:9000", "localhost", "[::1]:7860"])
def test_this_machine_by_any_name_is_served(page: TestClient, host: str) -> None:
    assert page.get("/lab/api/ping", headers={"host": host}).status_code == 200


def test_another_site_cannot_change_anything(page: TestClient) -> None:
    body = {"run": 1}
    evil = {"origin": "https://evil.example"}
    assert page.post("/lab/api/stop", json=body, headers=evil).status_code == 403
    assert page.get("/lab/api/ping", headers=evil).status_code == 403
    assert page.post("/lab/api/stop", json=body, headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert page.post("/gradio_api/upload", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert page.post("/lab/api/stop", content='{"run": 1}', headers={"content-type": "text/plain"}).status_code == 415
    assert page.post("/lab/api/stop", json=body, headers={"origin": BASE}).status_code == 200


def test_bodies_are_bounded(page: TestClient) -> None:
    assert page.post("/lab/api/stop", content=b" " * (BODY + 1), headers=JSON).status_code == 413
    assert page.post("/lab/api/stop", content=b"[1]", headers=JSON).status_code == 400
    assert page.post("/lab/api/stop", content=b"[" * 100_000, headers=JSON).status_code == 400


# ---- the port
def test_a_port_in_use_is_told() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 cannot be had"):
            listen("127.0.0.1", port)
    with pytest.raises(UserError, match="no address"):
        listen("no such host", 7860)


def test_answers_do_not_wait_for_acknowledgements() -> None:
    """asyncio sets TCP_NODELAY only on sockets whose protocol is named: 1 ms instead of 44 for an answer."""
    with listen("127.0.0.1", 0) as found:
        assert found.proto == socket.IPPROTO_TCP


# ---- files
def test_static_files_have_names_and_no_paths(page: TestClient) -> None:
    assets = Assets()
    for name in ("main.js", "theme.css", "plotly.min.js"):
        answer = page.get("/" + assets.url(name))
        assert answer.status_code == 200 and answer.content == assets.files[name].data
        assert "immutable" in answer.headers["cache-control"]
    assert page.get("/lab/static/other/main.js").headers["cache-control"] == "no-cache"
    for name in ("..%2fserver.py", "%2e%2e/server.py", "secret.txt", "__init__.py"):
        assert page.get(f"/lab/static/{assets.stamp}/{name}").status_code == 404


def test_compressed_forms_are_the_same_files() -> None:
    assets = Assets()
    assets.compress()
    file = assets.files["layer_map.js"]
    assert gzip.decompress(file.encoded["gzip"]) == file.data
    if (packed := brotli(file.data)) is not None:
        import brotli as package

        assert package.decompress(packed) == file.data and len(packed) < len(file.data) / 2


def test_modules_import_only_files_that_are_served() -> None:
    import re

    assets = Assets()
    for name, file in assets.files.items():
        if name.endswith(".js") and name != "plotly.min.js":
            text = file.data.decode()
            wanted = re.findall(r'^(?:import|export) (?:.*from )?"\./([\w.]+)"', text, re.M)
            assert all(w in assets.files for w in wanted), name
            assert "innerHTML" not in text and "http://" not in text.replace("http://www.w3.org", "")
            assert len(text.splitlines()) < (700 if name == "playground.js" else 350), name


# ---- uploads
def test_an_upload_is_kept_under_a_name_of_ours(page: TestClient) -> None:
    answer = page.post("/lab/api/upload?name=..%2F..%2Fmy%20rows.txt", content=b"a||b\nc||d\n", headers=FILE).json()
    assert answer["name"] == "my rows.txt" and len(answer["file"]) == 16


@pytest.mark.parametrize("name", ["run.exe", "noending", "", "a.txt.html"])
def test_other_endings_are_refused(page: TestClient, name: str) -> None:
    answer = page.post(f"/lab/api/upload?name={name}", content=b"x", headers=FILE).json()
    assert ".jsonl" in answer["error"] and answer["field"] == "task"


def test_too_large_a_file_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    from lora_core.tasks import data_files

    monkeypatch.setattr(data_files, "MOST_BYTES", 100)
    uploads = Uploads(tmp_path)

    async def chunks():  # noqa: ANN202
        for _ in range(3):
            yield b"x" * 60

    # In a thread of its own: where browser tests ran before, this one has Playwright's loop.
    with ThreadPoolExecutor(1) as pool, pytest.raises(UserError, match="larger than"):
        pool.submit(lambda: asyncio.run(uploads.take("rows.txt", chunks()))).result()
    assert not list(uploads.root.glob("*/*"))


def test_uploads_have_ids_and_no_paths(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path)
    for id in ("../../etc", "0" * 16, "", "g" * 16):
        with pytest.raises(UserError, match="no longer here"):
            uploads.path(id)


def test_old_uploads_are_swept(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path)
    source = tmp_path / "rows.txt"
    source.write_text("a||b")
    id, name = uploads.adopt(source, "rows.txt")
    uploads.sweep()
    assert uploads.path(id).name == name
    uploads.sweep(older_s=-1)
    with pytest.raises(UserError):
        uploads.path(id)


@pytest.mark.parametrize(("given", "kept"), [
    ("a/b\\c d.txt", "c d.txt"), ("..", "data"), (".txt", "txt"), ("ein Brief?*.TSV", "ein Brief__.TSV"),
    ("é.csv", "é.csv"), ("x" * 300 + ".txt", "x" * 80 + ".txt"), ("$(rm).jsonl", "_(rm).jsonl"),
])  # fmt: skip
def test_safe_names(given: str, kept: str) -> None:
    assert safe_name(given) == kept
