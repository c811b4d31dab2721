"""The server of the page: builds the app and runs it on this machine alone.

    serve(port=7860)                 # what `lora-lab serve` does
    app = create_app(store, queue)   # the ASGI app, for tests

Torch is imported after the page answers: the default model is loaded by a thread of its own.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.routing import Route

from app.pages.assets import Assets
from app.pages.guard import LOCAL, Guard
from app.pages.lab import Lab
from app.pages.session import ModelSession
from app.pages.uploads import Uploads
from app.runs.experiments import ExperimentRunner, working
from app.runs.queue import RunQueue
from app.runs.store import RunStore
from lora_core.errors import UserError
from lora_core.home import home
from lora_core.models import DEFAULT

HERE = ("127.0.0.1", "localhost", "::1")


def create_app(store: RunStore, queue: RunQueue, *, session: ModelSession | None = None, model: str | None = DEFAULT,
               hosts: tuple[str, ...] | None = LOCAL) -> Any:  # fmt: skip
    """The ASGI app. model: what is loaded once the page answers; None for nothing. hosts: as for Guard."""
    # Gradio's own folder for files: ours, and nobody else's
    os.environ.setdefault("GRADIO_TEMP_DIR", str(private_folder()))
    import gradio as gr

    from app.pages import api, page

    assets, folder = Assets(), store.root.parent
    session = session or ModelSession(assets.stamp, lambda: bool(store.list(1, status=("running",))) or working(folder))
    lab = Lab(store=store, queue=queue, session=session, uploads=Uploads(folder),
              experiments=ExperimentRunner(folder))

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        assets.compress()
        queue.boot()
        lab.uploads.sweep()
        if model is not None:
            lab.session.warm(model)
        else:
            lab.session.ready.set()
        try:
            yield
        finally:
            queue.close()

    outer = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=life)
    outer.router.routes.append(Route("/lab/static/{stamp}/{name}", assets.respond, methods=["GET", "HEAD"]))
    outer.router.routes.extend(api.routes(lab))
    gr.mount_gradio_app(outer, page.build(lab), "", footer_links=[], run_history=False, enable_monitoring=False,
                        ssr_mode=False, show_error=False, max_file_size="1kb", mcp_server=False, pwa=False,
                        theme=page.theme(), head=page.head(assets),
                        app_kwargs={"openapi_url": None, "docs_url": None, "redoc_url": None})  # fmt: skip
    return Guard(outer, hosts)


def serve(host: str = "127.0.0.1", port: int = 7860, open_browser: bool = True) -> None:
    """Run the page until Ctrl-C. Raises UserError when the port cannot be had."""
    import uvicorn

    listening = listen(host, port)
    bound = listening.getsockname()[1]
    store = RunStore()
    queue = RunQueue(store)
    local = host in HERE
    if not local:
        print(f"LoRA Lab: {host} can be reached by others, and there is no password: whoever reaches this port can "
              "use the page", file=sys.stderr)  # fmt: skip
    app = create_app(store, queue, hosts=LOCAL if local else None)
    shown = f"[{host}]" if ":" in host else "127.0.0.1" if host in ("0.0.0.0", "localhost") else host
    address = f"http://{shown}:{bound}"
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=2,
                                           server_header=False, date_header=False))  # fmt: skip
    threading.Thread(target=tell, args=(server, address, open_browser), name="tell", daemon=True).start()
    logging.getLogger("lora_lab").setLevel(logging.INFO)
    try:
        server.run(sockets=[listening])
    finally:
        listening.close()
        store.close()


def tell(server: Any, address: str, open_browser: bool) -> None:
    """Say where the page is, once it is there, and open it."""
    while not server.started:
        if server.should_exit:
            return
        threading.Event().wait(0.05)
    print(f"LoRA Lab is at {address}  (Ctrl-C ends it; runs go on)", flush=True)
    if open_browser:
        webbrowser.open(address)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises UserError when the port is in use or the address is not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError, OverflowError):
        raise UserError(f"host '{host}' is no address; 127.0.0.1 is this machine alone") from None
    # with its protocol named, asyncio switches Nagle's algorithm off; else every answer waits 40 ms for an ACK
    found = socket.socket(family, kind, protocol or socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
        found.listen(128)
    except OSError as error:
        found.close()
        why = error.strerror or error
        raise UserError(f"port {port} on {host} cannot be had: {why}; name another with --port") from None
    return found


def private_folder() -> Path:
    """A folder below ours for what Gradio writes; somewhere temporary when ours cannot be written."""
    try:
        folder = home() / "gradio"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder
    except (OSError, UserError):
        return Path(tempfile.mkdtemp(prefix="lora-lab-"))
