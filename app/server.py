"""The server of the page: builds the app and runs it on this machine alone.

    serve(port=7860)                 # what `lora-lab serve` does
    app = create_app(store, queue)   # the ASGI app, for tests

Torch is imported after the page answers: the default model is loaded by a thread of its own.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.routing import Route

from app.pages.assets import Assets
from app.pages.guard import LOCAL, Guard
from app.pages.kept import Kept
from app.pages.keys import Keys
from app.pages.lab import Lab
from app.pages.room import OpenRoom, invitation, open_room
from app.pages.session import ModelSession
from app.pages.shell import shell
from app.pages.sweeper import Sweeper
from app.pages.uploads import Uploads
from app.room.cells import Dispatcher
from app.runs.experiments import ExperimentRunner, working
from app.runs.queue import RunQueue
from app.runs.store import RunStore
from lora_core.errors import UserError
from lora_core.machine import few_heaps
from lora_core.models import DEFAULT

HERE = ("127.0.0.1", "localhost", "::1")
ANY = ("0.0.0.0", "::")
KEEP_S = 20  # a page asks at least every 15 s: its connections stay, and none closes just as it asks
MOST_CONNECTIONS = 600  # what comes beside is told to come again (503)


def create_app(store: RunStore, queue: RunQueue, *, session: ModelSession | None = None, model: str | None = DEFAULT,
               hosts: tuple[str, ...] = LOCAL, keys: Keys | None = None,
               room: OpenRoom | None = None) -> Any:  # fmt: skip
    """The ASGI app. model: what is loaded once the page answers; None for nothing. hosts and keys: as for Guard.

    room: see `app.pages.room.open_room`; None: there is none, and nothing of one is seen
    """
    os.environ["GRADIO_TEMP_DIR"] = str(private_folder(store.root.parent))  # its default is all programs' together
    import gradio as gr

    from app.pages import api, page

    assets, folder = Assets(), store.root.parent
    session = session or ModelSession(assets.stamp, lambda: bool(store.list(1, status=("running",))) or working(folder))
    lab = Lab(store=store, queue=queue, session=session, uploads=Uploads(folder),
              experiments=ExperimentRunner(folder), room=room)
    dispatcher = Dispatcher(room.room, store, queue) if room else None
    sweeper = Sweeper(lab)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        assets.compress()
        queue.boot()
        if dispatcher:
            dispatcher.boot()
        sweeper.boot()
        if model is not None:
            lab.session.warm(model)
        else:
            lab.session.ready.set()
        try:
            yield
        finally:
            if dispatcher:
                dispatcher.close()
            sweeper.close()
            queue.close()

    outer = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=life)
    outer.router.routes.append(Route("/lab/static/{stamp}/{name}", assets.respond, methods=["GET", "HEAD"]))
    outer.router.routes.extend(api.routes(lab))
    gr.mount_gradio_app(outer, page.build(lab), "", footer_links=[], run_history=False, enable_monitoring=False,
                        ssr_mode=False, show_error=False, max_file_size="1kb", mcp_server=False, pwa=False,
                        theme=page.theme(), head=page.head(assets, room is not None),
                        app_kwargs={"openapi_url": None, "docs_url": None, "redoc_url": None})  # fmt: skip
    dress = shell(assets, page.TABS, page.files(assets, room is not None))
    return Guard(Kept(outer, dress), hosts, keys)


def serve(host: str = "127.0.0.1", port: int = 7860, open_browser: bool = True, *, allow: tuple[str, ...] = (),
          new_key: bool = False, room: bool = False, minutes: float | None = None) -> None:  # fmt: skip
    """Run the page until Ctrl-C. Raises UserError when the port cannot be had.

    host     other than this machine alone: only those come in who have the link with the key, which is printed
    allow    more names that the page may be called by, beside those of this machine
    new_key  the links of before, and whoever came in by them, are no longer let in
    room     opens a room, with a link for the presenter and one for everybody else; minutes: its budget of training,
             None as it was before
    """
    import uvicorn

    few_heaps()
    listening = listen(host, port)
    bound = listening.getsockname()[1]
    store = RunStore()
    queue = RunQueue(store)
    base, here = f"http://{shown(host)}:{bound}", host in HERE
    keys = None if here and not room else Keys.kept(store.root.parent, room=room, new=new_key)
    address = f"{base}/?key={keys.presenter or keys.host}" if keys else base
    hall = open_room(store, participants=f"{base}/?key={keys.participant}", minutes=minutes) if room and keys else None
    app = create_app(store, queue, hosts=names(host, allow), keys=keys, room=hall)
    if keys and not here:
        which = "the first link" if room else "the link"
        print(f"LoRA Lab: others can reach this address. Whoever has {which} below may see and do all that you may; "
              "it travels without encryption, so keep to a network that you trust", file=sys.stderr)  # fmt: skip
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=2,
                                           server_header=False, date_header=False, proxy_headers=False,
                                           timeout_keep_alive=KEEP_S, limit_concurrency=MOST_CONNECTIONS))  # fmt: skip
    threading.Thread(target=tell, args=(server, address, open_browser, invitation(hall, here)),
                     name="tell", daemon=True).start()  # fmt: skip
    logging.getLogger("lora_lab").setLevel(logging.INFO)
    try:
        server.run(sockets=[listening])
    finally:
        listening.close()
        store.close()


def tell(server: Any, address: str, open_browser: bool, more: str = "") -> None:
    """Say where the page is, once it is there, and open it."""
    while not server.started:
        if server.should_exit:
            return
        threading.Event().wait(0.05)
    print(f"LoRA Lab is at {address}  (Ctrl-C ends it; runs go on)", flush=True)
    if more:
        print(more, flush=True)
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


def names(host: str, allow: tuple[str, ...] = ()) -> tuple[str, ...]:
    """What a request may call this server, as in a Host header without its port: the names and addresses of the
    machine that it can be reached by at `host`, and those allowed beside. Raises UserError for what is no name."""
    found = list(LOCAL)
    if host not in HERE:
        import psutil

        found += [socket.gethostname().lower(), f"{socket.gethostname().lower().partition('.')[0]}.local"]
        found += [host.lower()] if host not in ANY else [
            a.address.partition("%")[0] for each in psutil.net_if_addrs().values() for a in each
            if a.family in (socket.AF_INET, socket.AF_INET6)]  # fmt: skip
    for name in allow:
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,250}[A-Za-z0-9])?", name):
            raise UserError(f"'{name}' is no name of a machine; a name such as lab.example is, without port or slash")
    found += [n.lower() for n in allow]
    return tuple(dict.fromkeys(f"[{n}]" if ":" in n and not n.startswith("[") else n for n in found))


def shown(host: str) -> str:
    """The address in a link: of a server that listens everywhere, the one by which this machine reaches others."""
    if host in ("localhost", *HERE[:1]):
        return "127.0.0.1"
    if host in ANY:
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it only chooses the way
            return probe.getsockname()[0]
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def private_folder(home: Path) -> Path:
    """A folder below ours for what Gradio writes, for us alone; somewhere temporary when ours cannot be written."""
    folder = home / "gradio"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="lora-lab-"))
