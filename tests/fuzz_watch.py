"""What a fuzzed case may not do: run for long, use the network, unpickle, start a program, or write outside its folder.

    with watched(tmp_path), bounded():
        read_adapter(folder)

An audit hook sees every file, socket and process of Python's in all threads. It cannot be taken away again, so there is
one, and it looks only while something is watched.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_core.errors import UserError

CPU_S, WALL_S = 5.0, 60.0  # of one case: the second only for what waits, since other programs may have the processors
LONGEST = 1500  # characters of a message for a person
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg")
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")
CHANGES = ("os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.symlink", "os.link", "os.truncate")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
TOOLS = ("__pycache__", "/.hypothesis", "/torchinductor_")
ELSEWHERE = ("/dev/null", "/proc/self", "/dev/shm/")


class Watch:
    """What is allowed now, and what was done against it."""

    def __init__(self) -> None:
        self.roots: tuple[str, ...] = ()
        self.programs: tuple[str, ...] = ()
        self.seen: list[str] = []
        self.on = False
        self.hooked = False
        self.lock = threading.Lock()

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = args
            if isinstance(path, (str, bytes)) and (flags & WRITES or isinstance(mode, str) and set(mode) & set("wax+")):
                self._path(event, path)
        elif event in CHANGES:
            for path in (
                args[1:2] if event in ("os.symlink", "os.link") else args[:2]
            ):  # where it points is another matter
                if isinstance(path, (str, bytes, os.PathLike)) and args[-1] in (-1, None):  # not below an open folder
                    self._path(event, os.fspath(path))
        elif event in NETWORK:
            self.seen.append(f"{event} {args[1:]!r}"[:200])
            raise PermissionError(f"no network here: {event}")
        elif event in PROGRAMS or event == "pickle.find_class":
            if not (event == "subprocess.Popen" and str(args[0]) in self.programs):
                self.seen.append(f"{event} {args!r}"[:200])

    def _path(self, event: str, path: str | bytes) -> None:
        folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
        text = os.path.join(os.path.realpath(folder), name)
        if not text.startswith((*self.roots, *ELSEWHERE)) and not any(part in text for part in TOOLS):
            self.seen.append(f"{event} {text}"[:200])


WATCH = Watch()


@contextmanager
def watched(*roots: Path, programs: tuple[str, ...] = ()) -> Iterator[None]:
    """Fails where something below was done that is not allowed. roots: where may be written."""
    if not WATCH.hooked:
        sys.addaudithook(WATCH.hook)
        WATCH.hooked = True
    with WATCH.lock:
        WATCH.roots, WATCH.programs = tuple(os.path.realpath(r) for r in roots), programs
        WATCH.seen, WATCH.on = [], True
        try:
            yield
        finally:
            WATCH.on = False
    assert not WATCH.seen, "; ".join(WATCH.seen)


class Hangs(AssertionError):
    """A case took longer than it may."""


@contextmanager
def bounded(cpu_s: float = CPU_S, wall_s: float = WALL_S) -> Iterator[None]:
    """Raises Hangs in a block that uses more of the processor, or waits longer; in the main thread alone."""

    def late(number: int, frame: Any) -> None:
        raise Hangs(
            f"more than {cpu_s:g} s of the processor" if number == signal.SIGPROF else f"no end in {wall_s:g} s"
        )

    before = {n: signal.signal(n, late) for n in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, wall_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for n, handler in before.items():
            signal.signal(n, handler)


def told(call: Callable[[], Any]) -> Any:
    """What the call gives, or None where it says in a sentence why it does not. Anything else it raises is a crash."""
    try:
        return call()
    except UserError as error:
        sentence(str(error))
        return None


def sentence(text: str) -> None:
    """A message that a person can read: no traceback, and an end."""
    assert text.strip() and "Traceback" not in text and len(text) <= LONGEST, text[:300]
    text.encode("utf-8")  # no half of a surrogate pair: it could not be sent
