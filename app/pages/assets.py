"""The page's own files, read once, compressed once, and served under a name that changes with their content.

Only the names below app/static, and plotly.min.js out of the Plotly wheel, can be asked for: a request never becomes a
path. The folder in the address (`lab/1f3a…/main.js`) is a hash of everything, so browsers may keep a file for ever,
and modules that import each other by relative names always get the same generation.
"""

from __future__ import annotations

import gzip
import hashlib
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from lora_core.home import home

STATIC = Path(__file__).parent.parent / "static"
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
PLOTLY = "plotly.min.js"
QUALITY = 9  # of brotli: 0.7 s for Plotly's 4.8 MB; the last two levels take seconds for 5 % less


@dataclass
class File:
    """One file as it goes over the wire: plain, and in the encodings that are ready by now."""

    type: str
    data: bytes
    encoded: dict[str, bytes] = field(default_factory=dict)


class Assets:
    """All files that the page loads, and the addresses that they have."""

    def __init__(self) -> None:
        self.files = {p.name: File(TYPES[p.suffix], p.read_bytes()) for p in sorted(STATIC.iterdir())
                      if p.suffix in TYPES}  # fmt: skip
        self.files[PLOTLY] = File(TYPES[".js"], plotly_source().read_bytes())
        digest = hashlib.sha256()
        for name, file in self.files.items():
            digest.update(name.encode() + file.data)
        self.stamp = digest.hexdigest()[:12]

    def url(self, name: str) -> str:
        """Relative to the page, so that it works behind any prefix."""
        if name not in self.files:
            raise KeyError(name)
        return f"lab/static/{self.stamp}/{name}"

    def compress(self) -> None:
        """Make the compressed forms: the small files at once, Plotly in the background, kept for the next start."""
        for name, file in self.files.items():
            if name != PLOTLY and len(file.data) > 1000:
                file.encoded = {"gzip": gzip.compress(file.data, 6)}
                if (small := brotli(file.data)) is not None:
                    file.encoded["br"] = small
        threading.Thread(target=self._compress_plotly, name="compress-plotly", daemon=True).start()

    def _compress_plotly(self) -> None:
        file = self.files[PLOTLY]
        name = hashlib.sha256(file.data).hexdigest()[:16]
        makers = {"gzip": lambda data: gzip.compress(data, 9), "br": brotli}  # browsers take br of this machine alone
        for encoding, make in makers.items():
            with suppress(Exception):  # a read-only or full cache: then it is made anew at each start
                kept = home() / "web" / f"plotly-{name}.{encoding}"
                if kept.exists():
                    file.encoded[encoding] = kept.read_bytes()
                    continue
                if (small := make(file.data)) is None:
                    continue
                file.encoded[encoding] = small
                kept.parent.mkdir(exist_ok=True)
                part = kept.with_suffix(".part")
                part.write_bytes(small)
                part.replace(kept)

    async def respond(self, request: Request) -> Response:
        """The route `lab/static/{stamp}/{name}`."""
        file = self.files.get(request.path_params["name"])
        if file is None:
            return Response("no such file", 404, media_type="text/plain")
        current = request.path_params["stamp"] == self.stamp
        headers = {"Cache-Control": "public, max-age=31536000, immutable" if current else "no-cache",
                   "Vary": "Accept-Encoding"}  # fmt: skip
        accepted = request.headers.get("accept-encoding", "")
        for encoding in ("br", "gzip"):
            if encoding in accepted and encoding in file.encoded:
                headers["Content-Encoding"] = encoding
                return Response(file.encoded[encoding], headers=headers, media_type=file.type)
        return Response(file.data, headers=headers, media_type=file.type)


def brotli(data: bytes) -> bytes | None:
    """Compressed with brotli where that package is there (Gradio brings it), else None."""
    try:
        import brotli as package
    except ImportError:
        return None
    return package.compress(data, quality=QUALITY)


def plotly_source() -> Path:
    """plotly.min.js in the Plotly wheel; found without importing Plotly, which takes a second."""
    spec = find_spec("plotly")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "package_data" / PLOTLY
