"""`lora-lab serve`: the page."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import Annotated

import typer

from app.commands.output import say
from lora_core.errors import UserError

TRIES = 50  # ports after the one that was asked for


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; 127.0.0.1 is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; when it is taken, the next free one; 0: any free one.")] = 7860,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Do not open the page in a browser.")] = False,
    allow_host: Annotated[list[str] | None, typer.Option(help="Another name that the page is called by, such as that "
                                                              "of a proxy; may be given several times.")] = None,
    new_key: Annotated[bool, typer.Option("--new-key", help="Make new links; those of before let nobody in.")] = False,
    room: Annotated[bool, typer.Option("--room", help="Open a room: a presenter's link, and one with a QR code for "
                                                      "everybody else.")] = False,
    minutes: Annotated[float | None, typer.Option(help="Of a room: how long the machine may train for one question; "
                                                       "10 at first, and the presenter can change it.")] = None,
) -> None:
    """The page: train, compare and look inside in a browser."""
    if room:
        share_processors()
    free = free_port(host, port)
    if free != port != 0:
        say(f"port {port} is in use; taking port {free} instead")
    fetch_default()
    start(host=host, port=free, open_browser=not no_browser, allow=tuple(allow_host or ()), new_key=new_key,
          room=room, minutes=minutes)  # fmt: skip


def share_processors() -> None:
    """Let threads of a matrix product that wait for each other soon sleep, here and in what is started from here.

    Awake they wait a little faster, and keep the processors from others: on two cores a training alone takes a fifth
    longer like this, and half as long beside somebody who computes. Before torch is imported.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def start(*, host: str, port: int, open_browser: bool, allow: tuple[str, ...] = (), new_key: bool = False,
          room: bool = False, minutes: float | None = None) -> None:  # fmt: skip
    """Run the page until it is stopped."""
    from app.server import serve as run

    with suppress(KeyboardInterrupt):  # Ctrl-C is how a page ends
        run(host=host, port=port, open_browser=open_browser, allow=allow, new_key=new_key,
            room=room, minutes=minutes)  # fmt: skip


def free_port(host: str, port: int) -> int:
    """The port, or the next one that is free; UserError when the address is not this machine's, or none is free."""
    if not 0 <= port <= 65535:
        raise UserError(f"port is {port}; ports go from 1 to 65535, and 0 takes any that is free")
    for candidate in [port, *range(port + 1, min(port + TRIES, 65535) + 1)]:
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0]
        except (OSError, UnicodeError) as error:
            raise UserError(f"host '{host}' is no address; 127.0.0.1 is this machine alone") from error
        with socket.socket(family, kind) as probe:
            if os.name == "posix":  # elsewhere this option would let two servers share a port
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
                return probe.getsockname()[1]
            except PermissionError as error:
                raise UserError(f"port {candidate} needs special rights; take one above 1023") from error
            except OSError as error:
                if error.errno in (99, 49, 10049):  # the address is not available, on Linux, macOS and Windows
                    raise UserError(f"host '{host}' is not an address of this machine") from error
    raise UserError(f"ports {port} to {min(port + TRIES, 65535)} are all in use; name another with --port")


def fetch_default() -> None:
    """Bring the default model here before the page asks for it. Without network the page starts all the same."""
    from lora_core import embedded
    from lora_core.models import DEFAULT

    try:
        embedded.fetch(DEFAULT)
    except UserError as error:
        say(f"the page starts without its default model: {error}")
