"""Outside everything: who may talk to the server, and what the page may do.

Pure ASGI, since it must see every request before Gradio does. Three refusals: a Host that is not this machine (DNS
rebinding), another site's page that sends something here, and a body that is too large. To every answer it adds the
Content-Security-Policy that makes requests to other machines impossible.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOCAL = ("127.0.0.1", "localhost", "[::1]")
POLICY = "; ".join((
    "default-src 'self'",
    "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",  # Gradio's front end needs all three
    "style-src 'self' 'unsafe-inline'",
    "img-src 'self' data: blob:",
    "font-src 'self' data:",
    "connect-src 'self' data: blob:",
    "worker-src 'self' blob:",
    "object-src 'none'",
    "base-uri 'self'",
    "form-action 'self'",
    "frame-ancestors 'none'",
))  # fmt: skip
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
BODY = 2 << 20  # bytes of a request's body; uploads count their own
OWN_LIMIT = ("/lab/api/upload", "/lab/api/open-file")


class TooLarge(Exception):
    """A body went past its limit."""


class Guard:
    """Wraps an ASGI app. hosts: names that requests may be addressed to; None: any (the user bound another address)."""

    def __init__(self, app: App, hosts: tuple[str, ...] | None = LOCAL) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        if refused := self._refusal(scope["method"], headers):
            await answer(send, *refused)
            return
        count, large, started = 0, False, False

        async def counted() -> Message:
            nonlocal count, large
            message = await receive()
            count += len(message.get("body", b""))
            if count > BODY and scope["path"] not in OWN_LIMIT:
                large = True
                raise TooLarge
            return message

        async def labelled(message: Message) -> None:
            nonlocal started
            if large:  # what the app makes of the broken-off request is not its answer
                return
            if message["type"] == "http.response.start":
                started = True
                known = {k for k, _ in message.get("headers", ())}
                extra = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in known]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        try:
            await self.app(scope, counted, labelled)
        except TooLarge:
            if not started:
                await answer(send, 413, "the request is too large")

    def _refusal(self, method: str, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if self.hosts is not None and host.rsplit(":", 1)[0] not in self.hosts and host not in self.hosts:
            return 421, "this address is not the page's own"
        origin = headers.get("origin")
        if origin and origin != "null" and urlsplit(origin).netloc != host:
            return 403, "another site may not use this page"
        site = headers.get("sec-fetch-site", "same-origin")
        if method not in ("GET", "HEAD") and site not in ("same-origin", "none"):
            return 403, "another site may not use this page"
        return None


async def answer(send: Send, status: int, text: str) -> None:
    body = json.dumps({"error": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(k.encode(), v.encode()) for k, v in HEADERS.items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
