"""What everybody gets alike is made once, and is what Gradio itself would have said."""

from __future__ import annotations

import asyncio
import gzip
import re
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.pages import kept
from app.pages.assets import Assets
from app.pages.kept import Kept
from app.pages.shell import shell
from app.runs.store import RunStore
from tests.pages_kit import client


def run(what: Coroutine[Any, Any, Any]) -> Any:
    """In a thread of its own: this one's loop may belong to a browser."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(what)).result()


def packed(page: TestClient, path: str = "/") -> Any:
    """The answer once it comes compressed."""
    for _ in range(300):
        answer = page.get(path, headers={"accept-encoding": "gzip"})
        if "content-encoding" in answer.headers:
            return answer
        time.sleep(0.05)
    raise AssertionError("it is never compressed")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with client(RunStore(tmp_path_factory.mktemp("home"))) as found:
        yield found


def test_the_page_is_kept_and_answers_with_its_tag(page: TestClient) -> None:
    first, second = page.get("/"), packed(page)
    assert first.text == second.text and "LoRA Lab" in first.text and first.headers["cache-control"] == "no-cache"
    assert second.headers["content-encoding"] == "gzip" and "content-security-policy" in second.headers
    again = page.get("/", headers={"if-none-match": first.headers["etag"]})
    assert again.status_code == 304 and again.content == b""
    head = page.head("/")
    assert head.status_code == 200 and head.content == b"" and int(head.headers["content-length"]) > 1000


def test_what_is_seen_first_waits_for_no_style_sheet_and_no_module(page: TestClient) -> None:
    text = page.get("/").text
    first = text.index('id="ll-first"')
    assert text.index("modulepreload") < first < text.index("<gradio-app") and "Questions" in text[first:][:600]
    before = text[: text.index("<body")]
    sheets = re.findall(r'<link[^>]*rel="stylesheet"[^>]*>', before)
    assert sheets and all('media="print"' in sheet for sheet in sheets)  # Gradio's too
    for address in re.findall(r'<link rel="(?:modulepreload|preload)"[^>]* href="([^"]+)"', before):
        assert page.head(f"/{address}").status_code == 200, address
    assert "room" not in " ".join(re.findall(r'href="([^"]+)"', before))


def test_a_page_that_is_not_gradios_stays_as_it_is() -> None:
    dressed = shell(Assets(), (("play", "<Play>"),), [])
    assert dressed(b"<p>nothing</p>") == b"<p>nothing</p>"
    made = dressed(b"<head><script></script></head><body><gradio-app></gradio-app>")
    assert b"&lt;Play&gt;" in made and made.endswith(b"<gradio-app></gradio-app>")


def test_each_address_has_its_own_page_and_nobody_can_put_another_one_there(page: TestClient) -> None:
    evil = {"host": "localhost:7860", "x-forwarded-host": "evil.example", "x-forwarded-proto": "https"}
    assert "evil.example" not in page.get("/", headers=evil).text
    assert '"root":"http://localhost:7860"' in page.get("/", headers={"host": "localhost:7860"}).text
    assert '"root":"http://127.0.0.1:7860"' in page.get("/").text


def test_modules_may_stay_for_ever_and_faults_are_not_kept(page: TestClient) -> None:
    module = re.search(r"assets/[\w.-]+\.js", page.get("/").text)
    assert module is not None
    answer = page.get("/" + module[0])
    assert "immutable" in answer.headers["cache-control"] and len(answer.content) > 1000
    assert page.get("/assets/nothing-12345678.js").status_code == 404


class Slow:
    """An app that counts how often it is asked."""

    def __init__(self, size: int = 5000) -> None:
        self.asked: list[str] = []
        self.size = size

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.append(scope["path"])
        await asyncio.sleep(0.05)
        headers = [(b"content-type", b"text/html"), (b"set-cookie", b"mine=1")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"<p>" * self.size})


async def asked(app: Any, path: str, host: str = "here", **headers: str) -> tuple[dict[bytes, bytes], bytes]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "asgi": {}, "http_version": "1.1", "scheme": "http", "method": "GET",
             "server": ("here", 80), "path": path, "headers": [(b"host", host.encode()), (b"cookie", b"secret=1"),
                                       *((k.encode(), v.encode()) for k, v in headers.items())]}  # fmt: skip
    await app(scope, None, send)
    return dict(sent[0]["headers"]), sent[1]["body"]


def test_thirty_arrivals_at_once_are_one_question() -> None:
    slow = Slow()

    async def thirty() -> list[Any]:
        app = Kept(slow)
        return await asyncio.gather(*(asked(app, "/", **{"accept-encoding": "gzip"}) for _ in range(30)))

    answers = run(thirty())
    assert slow.asked == ["/"] and {body for _, body in answers} == {b"<p>" * 5000}
    assert all(b"set-cookie" not in headers for headers, _ in answers)


def test_what_is_asked_for_again_is_compressed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(kept, "brotli", lambda data: made.append(len(data)) or b"small")

    async def visits() -> list[Any]:
        app, found = Kept(Slow()), []
        for accepted in ("br", "br", "br, gzip", "br, gzip", "gzip", "identity"):
            found.append(await asked(app, "/", **{"accept-encoding": accepted}))
            await asyncio.gather(*app.packing.values())
        return found

    answers = run(visits())
    assert [headers.get(b"content-encoding") for headers, _ in answers] == [None, None, b"br", b"br", b"gzip", None]
    assert made == [15_000] and gzip.decompress(answers[4][1]) == answers[5][1] == b"<p>" * 5000
    assert len({headers[b"etag"] for headers, _ in answers}) == 1


def test_what_nobody_asked_for_again_is_compressed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "LATER_S", 0.01)

    async def once() -> dict[str, bytes]:
        app = Kept(Slow())
        await asked(app, "/")
        for _ in range(200):
            if app.answers["/", "here"].packed:
                break
            await asyncio.sleep(0.02)
        return app.answers["/", "here"].encoded

    assert {"", "gzip"} < {*run(once())} | {"br"}


def test_who_goes_away_takes_nothing_from_the_others() -> None:
    slow = Slow()

    async def two() -> bytes:
        app = Kept(slow)
        first = asyncio.create_task(asked(app, "/"))
        await asyncio.sleep(0.01)
        second = asyncio.create_task(asked(app, "/"))
        await asyncio.sleep(0.01)
        first.cancel()
        return (await second)[1]

    assert run(two()) == b"<p>" * 5000 and slow.asked == ["/"]


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST_NAMES", 5)
    app = Kept(Slow(10))

    async def many() -> None:
        for i in range(12):
            await asked(app, "/", f"127.0.0.1:{i}")

    run(many())
    assert len(app.answers) == 5
