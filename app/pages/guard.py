"""Outside everything: who may talk to the server, about what, and what the page may do.

Pure ASGI, since it must see every request before Gradio does. It refuses a Host that is not one of ours (DNS
rebinding), another site's page, whoever has no key where keys are asked for, addresses that the page does not use, a
session that is somebody else's, and bodies that are too large or too slow. It sets `asking` for whatever runs inside.
To every answer it adds the Content-Security-Policy that makes requests to other machines impossible.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, parse_qsl, quote, unquote_plus, urlencode, urlsplit

from app.pages import addresses
from app.pages.keys import DAYS, Brake, Keys
from app.pages.visitor import HOST, Visitor, asking

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
BODY = 2 << 20  # bytes of a request's body
LARGE = {"/lab/api/upload": 65 << 20, "/lab/api/open-file": (2 << 30) + 1}  # these count once more, by their quotas
SLOW_S = 60.0  # between two pieces of a body
MOST_VALUES = 4  # of one event or endpoint of Gradio's; how many each takes is for it to say
STREAMS = 40  # requests that one visitor may have open at once
# Gradio repeats a request's own headers in the answer to a Range, and lets other sites read where it knows their name
UNHEARD = (b"range", b"if-range")
UNSAID = (b"cookie", b"authorization", b"host", b"user-agent", b"referer", b"origin")
RANGE = re.compile(rb"bytes=\d{1,15}-\d{0,15}")  # one piece: of a thousand the answer is slow to make
KEY = re.compile(r"(?:^|&)key=([^&]*)")
KEYLESS = "this page needs the whole link that its host gave out, with the key at its end"
TRIED = "too many wrong keys came from your address; wait a few seconds and open the link again"


class TooLarge(Exception):
    """A body went past its limit, or did not come on."""


class Guard:
    """Wraps an ASGI app.

    hosts  names that requests may be addressed to, as in a Host header without its port
    keys   what opens the door; None: whoever reaches this port is the host
    """

    def __init__(self, app: App, hosts: tuple[str, ...] = LOCAL, keys: Keys | None = None) -> None:
        self.app, self.hosts, self.keys = app, hosts, keys
        self.brake, self.tied = Brake(), addresses.Tied()
        self.open: Counter[str] = Counter()  # requests by session

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # nothing here speaks it
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        else:
            await self._request(scope, receive, send)

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: dict[str, str] = {}
        for k, v in scope["headers"]:
            name = k.decode("latin-1").lower()
            headers[name] = "; ".join([*([headers[name]] if name in headers else []), v.decode("latin-1")])
        path, method = scope["path"], scope["method"]
        if refused := self._elsewhere(method, path, headers):
            await answer(send, path, *refused)
            return
        who, session = HOST, ""
        if self.keys is not None:
            query = scope.get("query_string", b"").decode("latin-1")
            if method in ("GET", "HEAD") and (token := KEY.search(query)):
                await self._entry(scope, query, unquote_plus(token[1]), headers, send)
                return
            found = self._cookie(headers)
            if found is None:
                await answer(send, path, 401, KEYLESS)
                return
            who, session = found
        if not addresses.there(method, path):
            await answer(send, path, 404, "there is nothing at this address")
            return
        if session and self.open[session] >= STREAMS:
            await answer(send, path, 429, f"{STREAMS} questions of yours are being answered; wait for one of them")
            return
        self.open[session] += 1
        token = asking.set(who)
        try:
            await self._answered(scope, receive, send, who, session)
        finally:
            asking.reset(token)
            self.open[session] -= 1
            if not self.open[session]:
                del self.open[session]

    # ---- who
    def _elsewhere(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """Why a request is not meant for us, or not sent by our page."""
        host = headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rsplit(":", 1)[0]
        if name.rstrip(".") not in self.hosts:
            return 421, "this address is not the page's own; --allow-host adds a name to those that are"
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "")
        if origin == "null":  # a page of ours is never without a name
            return None if site == "same-origin" else (403, "another site may not use this page")
        if origin and (urlsplit(origin).netloc.lower() != host or not origin.startswith(("http://", "https://"))):
            return 403, "another site may not use this page"
        if site in ("", "same-origin", "none"):
            return None
        linked = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
        if method == "GET" and path == "/" and linked:  # somebody followed a link to the page
            return None
        return 403, "another site may not use this page"

    def _cookie(self, headers: dict[str, str]) -> tuple[Visitor, str] | None:
        assert self.keys is not None
        try:
            sealed = SimpleCookie(headers.get("cookie", "")[:8000]).get(self.keys.cookie)
        except CookieError:
            return None
        return self.keys.open(sealed.value) if sealed is not None else None

    async def _entry(self, scope: Scope, query: str, token: str, headers: dict[str, str], send: Send) -> None:
        """A link with a key: a cookie for the right one, and the address without it."""
        assert self.keys is not None
        address = (scope.get("client") or ("",))[0]
        if not self.brake.open(address):
            await answer(send, scope["path"], 429, TRIED, {"retry-after": "5"})
            return
        role = self.keys.role(token)
        if role is None:
            self.brake.wrong(address)
            await answer(send, scope["path"], 401, KEYLESS)
            return
        before = self._cookie(headers)
        rest = [(k, v) for k, v in parse_qsl(query, keep_blank_values=True) if k != "key"]
        where = quote("/" + scope["path"].lstrip("/\\"), safe="/:@!$&'()*+,;=~-._") + (
            f"?{urlencode(rest)}" if rest else "")  # fmt: skip
        more = {"location": where}
        if before is None or role != "participant":  # who is in already stays who they are
            sealed, life = self.keys.seal(role), DAYS * 86_400
            more["set-cookie"] = f"{self.keys.cookie}={sealed}; HttpOnly; SameSite=Lax; Path=/; Max-Age={life}"
        await answer(send, scope["path"], 303, "", more)

    # ---- what
    async def _answered(self, scope: Scope, receive: Receive, send: Send, who: Visitor, session: str) -> None:
        path, started, broken, whole = scope["path"], False, False, False
        most, count = LARGE.get(path, BODY), 0
        head = [(k, v) for k, v in scope["headers"] if k.lower() not in UNHEARD
                or path.startswith("/lab/api/take/") and RANGE.fullmatch(v)]  # fmt: skip
        declared = dict(head).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared[:20]) > most:
            await answer(send, path, 413, "the request is too large")
            return

        async def counted() -> Message:
            nonlocal count, broken, whole
            try:
                message = await (receive() if whole else asyncio.wait_for(receive(), SLOW_S))
            except TimeoutError:
                broken = True
                raise TooLarge from None
            count += len(message.get("body", b""))
            whole = whole or not message.get("more_body")
            if count > most:
                broken = True
                raise TooLarge
            return message

        async def labelled(message: Message) -> None:
            nonlocal started
            if broken:  # what the app makes of the broken-off request is not its answer
                return
            if message["type"] == "http.response.start":
                started = True
                said = [(k, v) for k, v in message.get("headers", ()) if k.lower() not in UNSAID
                        and not k.lower().startswith((b"access-control-", b"sec-"))]  # fmt: skip
                known = {k.lower() for k, _ in said}
                extra = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in known]
                message = {**message, "headers": [*said, *extra]}
            await send(message)

        query = addresses.asked(scope.get("query_string", b"").decode("latin-1"))
        inner = {**scope, "headers": head, "lora_lab.visitor": who}
        if not path.startswith("/lab/"):
            inner["query_string"] = query.encode("latin-1")
        try:
            heard: Receive = counted
            if path.startswith("/gradio_api/"):
                refused, heard = await self._gradio(scope["method"], path, query, session, counted)
                if refused:
                    await answer(send, path, *refused)
                    return
            await self.app(inner, heard, labelled)
        except TooLarge:
            if not started:
                await answer(send, path, 413, "the request is too large, or came too slowly")

    async def _gradio(self, method: str, path: str, query: str, session: str,
                      receive: Receive) -> tuple[tuple[int, str] | None, Receive]:  # fmt: skip
        """(why a request to Gradio is refused, its body to be read again)."""
        hash: Any = None
        if method == "POST":
            data, more = b"", True
            while more:
                message = await receive()
                data, more = data + message.get("body", b""), bool(message.get("more_body"))
                if message["type"] == "http.disconnect":
                    break
            try:
                body = await asyncio.to_thread(strict, data)
            except (ValueError, RecursionError):
                return (400, "that is not JSON"), receive
            if not isinstance(body, dict) or addresses.holds_file(body):
                return (400, "no files go this way"), receive
            rows = body.get("data")
            if path.endswith("/join") and (not isinstance(rows, list) or len(rows) > MOST_VALUES):
                return (400, f"at most {MOST_VALUES} values are expected here"), receive
            hash, receive = body.get("session_hash"), again(data, receive)
        elif "/heartbeat/" in path:
            hash = path.rpartition("/")[2]
        elif path.endswith("/queue/data"):
            hash = (parse_qs(query).get("session_hash") or [None])[0]
        else:
            return None, receive
        mine = self.tied.mine(session, hash) if session else isinstance(hash, str)
        return None if mine else (403, "that session is not yours"), receive


def strict(data: bytes) -> Any:
    """JSON of finite numbers alone. Raises ValueError for anything else."""

    def number(text: str) -> float:
        value = float(text)
        if value - value != 0:
            raise ValueError(f"{text[:20]} is no finite number")
        return value

    def refused(text: str) -> Any:
        raise ValueError(f"{text} is no finite number")

    return json.loads(data, parse_float=number, parse_constant=refused)


def again(data: bytes, receive: Receive) -> Receive:
    """A body that was read, to be read once more; then what comes behind it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": data, "more_body": False}

    return replay


async def answer(send: Send, path: str, status: int, text: str, more: dict[str, str] | None = None) -> None:
    """A sentence: as JSON to the page's own questions, else as plain text."""
    ours = path.startswith("/lab/api/")
    body = json.dumps({"error": text}).encode() if ours else f"{text}\n".encode() if text else b""
    kind = "application/json" if ours else "text/plain; charset=utf-8"
    told = {"content-type": kind, "content-length": str(len(body)), "cache-control": "no-store", **HEADERS}
    headers = [(k.encode(), v.encode("latin-1", "replace")) for k, v in (told | (more or {})).items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
