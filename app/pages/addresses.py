"""Which addresses there are: all of ours, and of Gradio's only those that the page and `gradio_client` ask for.

Gradio serves some sixty more: files by their paths, a proxy, uploads, recordings, deep links, monitoring, logins, MCP.
None of them is used here, so none is answered. `tied` finds the session that a request of Gradio's is about.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

NAME = r"[\w.@+-]{1,200}"  # no slash and no colon
READ = re.compile(
    r"/|/config|/theme\.css|/manifest\.json|/robots\.txt|/favicon\.ico"
    rf"|/(?:assets|static)(?:/{NAME}){{1,6}}"
    r"|/gradio_api/info/?"
    r"|/gradio_api/heartbeat/[\w-]{1,64}|/gradio_api/queue/data"
)
WRITE = re.compile(r"/gradio_api/(?:queue/join|cancel|reset/?)")
OURS = re.compile(r"/lab/(?:api|static)/.{1,400}")
ASKED = ("page", "deep_link", "__theme")  # of an address of Gradio's; what the page itself does not use is left out
MOST_SESSIONS, MOST_HASHES = 2000, 64
HASH = re.compile(r"[\w-]{1,64}")


def there(method: str, path: str) -> bool:
    """Whether anything answers at this address."""
    if OURS.fullmatch(path):
        return True
    if ".." in path:
        return False
    return bool((READ if method in ("GET", "HEAD") else WRITE if method == "POST" else OURS).fullmatch(path))


def asked(query: str) -> str:
    """The query without what makes Gradio restore a saved state, change its page or its theme."""
    parts = [p for p in query.split("&") if re.split("=", p, maxsplit=1)[0] not in ASKED]
    return "&".join(parts)


def holds_file(value: Any) -> bool:
    """Whether anything in a request is a file by Gradio's names: it would be fetched, or read from a path."""
    todo = [value]
    while todo:
        x = todo.pop()
        if isinstance(x, Mapping):
            kind = x.get("meta")
            if isinstance(kind, Mapping) and str(kind.get("_type", "")).startswith("gradio."):
                return True
            if isinstance(x.get("path"), str) and ("url" in x or "orig_name" in x or "://" in x["path"]):
                return True
            todo += x.values()
        elif isinstance(x, list):
            todo += x
    return False


class Tied:
    """Which visitor's session a `session_hash` is: whoever used it first. A visitor has at most 64 of them."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}
        self.known: OrderedDict[str, OrderedDict[str, None]] = OrderedDict()

    def mine(self, session: str, hash: Any) -> bool:
        """Whether this hash is the session's, which it is from the first time on."""
        if not isinstance(hash, str) or not HASH.fullmatch(hash):
            return False
        if self.of.setdefault(hash, session) != session:
            return False
        own = self.known.setdefault(session, OrderedDict())
        own[hash] = None
        own.move_to_end(hash)
        self.known.move_to_end(session)
        while len(own) > MOST_HASHES:
            self.of.pop(own.popitem(last=False)[0], None)
        while len(self.known) > MOST_SESSIONS:
            for old in self.known.popitem(last=False)[1]:
                self.of.pop(old, None)
        return True
