"""Gradio's own answers that are the same for everybody, made once: the page, its theme, its modules.

Gradio writes the page anew for every arrival (60 ms of a processor) and compresses its modules each time that one is
asked for (as much again). Here the first to ask waits, and all others get what it got. It comes as it is, so that the
first visit does not wait for compression beside the start of everything else; some seconds later, or when it is asked
for again, it is compressed as far as it goes, one thing at a time.
What is asked is asked in our words: of a visitor's headers only the host comes through, so nobody's answer depends on
somebody else's request.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

from starlette.concurrency import run_in_threadpool

from app.pages.assets import brotli

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

BY_HOST = ("/", "/config", "/gradio_api/info")  # what has the page's own address in it
SAME = re.compile(r"/theme\.css|/(?:assets|static)/.+")
HASHED = re.compile(r"/assets/[\w.]+-[\w-]{8,}\.(?:js|css|woff2)")  # a changed file has another name
MOST_ONE, MOST_ALL, MOST_NAMES = 4 << 20, 48 << 20, 600  # bytes of an answer, of all, and how many
SMALL = 600  # bytes that are not worth compressing
LATER_S = 10.0  # until what nobody has asked for again is compressed for those who will come
PLAIN = ("image/", "font/", "application/octet-stream")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer as it was given: its type, its bytes in each encoding, and what tells it from a later one.

    packed  whether all encodings that it will have are there
    """

    type: str
    tag: str
    encoded: dict[str, bytes]
    packed: bool

    @property
    def size(self) -> int:
        return sum(map(len, self.encoded.values()))


class Kept:
    """Wraps an ASGI app. dress: what is done with the page before it is kept."""

    def __init__(self, app: Any, dress: Callable[[bytes], bytes] = bytes) -> None:
        self.app, self.dress = app, dress
        self.answers: OrderedDict[tuple[str, str], Answer] = OrderedDict()
        self.making: dict[tuple[str, str], asyncio.Task[Answer | None]] = {}
        self.packing: dict[tuple[str, str], asyncio.Task[None]] = {}
        self.one = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD") or not (
                path in BY_HOST or SAME.fullmatch(path)):  # fmt: skip
            await self.app(scope, receive, send)
            return
        headers = {k.lower(): v for k, v in scope["headers"]}
        found = await self._answer(scope, path, headers.get(b"host", b"") if path in BY_HOST else b"")
        if found is None:
            await self.app(scope, receive, send)
            return
        await self._send(scope["method"], path, found, headers, send)

    async def _answer(self, scope: Scope, path: str, host: bytes) -> Answer | None:
        """What is kept, or what is made now; None for what is not to be kept (an error, or too large)."""
        key = (path, host.decode("latin-1"))
        if (found := self.answers.get(key)) is not None:
            self.answers.move_to_end(key)
            self._pack_soon(key)
            return found
        if key not in self.making:
            self.making[key] = asyncio.create_task(self._make(scope, key))
        return await asyncio.shield(self.making[key])  # a visitor who goes away takes nothing from the others

    async def _make(self, scope: Scope, key: tuple[str, str]) -> Answer | None:
        try:
            path, host = key
            told = scope.get("server") or ("127.0.0.1", None)
            asked = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "path": path,
                     "raw_path": path.encode(), "root_path": "", "query_string": b"", "state": {}, "server": told,
                     "scheme": scope.get("scheme", "http"), "client": ("127.0.0.1", 0),
                     "headers": [(b"host", (host or f"{told[0]}:{told[1] or 80}").encode("latin-1"))],
                     "lora_lab.visitor": scope.get("lora_lab.visitor")}  # fmt: skip
            status, type, body = await collected(self.app, asked)
            if status != 200 or len(body) > MOST_ONE:
                return None
            body = self.dress(body) if path == "/" else body
            tag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
            made = Answer(type=type, tag=tag, encoded={"": body}, packed=len(body) <= SMALL or type.startswith(PLAIN))
            self.answers[key] = made
            while len(self.answers) > MOST_NAMES or sum(a.size for a in self.answers.values()) > MOST_ALL:
                self.answers.popitem(last=False)
            asyncio.get_running_loop().call_later(LATER_S, self._pack_soon, key)
            return made
        finally:
            self.making.pop(key, None)

    def _pack_soon(self, key: tuple[str, str]) -> None:
        found = self.answers.get(key)
        if found is not None and not found.packed and key not in self.packing:
            self.packing[key] = asyncio.create_task(self._pack(key, found))

    async def _pack(self, key: tuple[str, str], found: Answer) -> None:
        try:
            async with self.one:
                made = await run_in_threadpool(packed, found)
            if self.answers.get(key) is found:
                self.answers[key] = made
        finally:
            self.packing.pop(key, None)

    async def _send(self, method: str, path: str, found: Answer, asked: dict[bytes, bytes], send: Send) -> None:
        accepted = asked.get(b"accept-encoding", b"").decode("latin-1")
        encoding = next((e for e in ("br", "gzip") if e in accepted and e in found.encoded), "")
        data = found.encoded[encoding]
        lasting = "public, max-age=31536000, immutable" if HASHED.fullmatch(path) else "no-cache"
        headers = {"content-type": found.type, "etag": found.tag, "cache-control": lasting, "vary": "Accept-Encoding"}
        fresh = found.tag in asked.get(b"if-none-match", b"").decode("latin-1")
        if not fresh:
            headers["content-length"] = str(len(data))
            headers |= {"content-encoding": encoding} if encoding else {}
        await send({"type": "http.response.start", "status": 304 if fresh else 200,
                    "headers": [(k.encode(), v.encode("latin-1")) for k, v in headers.items()]})  # fmt: skip
        await send({"type": "http.response.body", "body": b"" if fresh or method == "HEAD" else data})


def packed(found: Answer) -> Answer:
    """The same in all encodings that make it smaller."""
    encoded = {"": (body := found.encoded[""]), "gzip": gzip.compress(body, 6, mtime=0)}
    if (small := brotli(body)) is not None:
        encoded["br"] = small
    return replace(found, encoded=encoded, packed=True)


async def collected(app: Any, scope: Scope) -> tuple[int, str, bytes]:
    """(status, type, body) of an app's answer to a request without a body."""
    status, kind, parts = 500, "", []
    waits = asyncio.Event()
    asked = False

    async def receive() -> Message:
        nonlocal asked
        if asked:
            await waits.wait()
        asked = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, kind
        if message["type"] == "http.response.start":
            status = message["status"]
            kind = next((v.decode("latin-1") for k, v in message["headers"] if k.lower() == b"content-type"), "")
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, kind, b"".join(parts)
