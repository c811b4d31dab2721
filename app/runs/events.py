"""A run's events: one JSON object a line, appended by the one worker, read by anybody at any time."""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_core.home import sync_folder

NAME = "events.jsonl"


def plain(value: Any) -> Any:
    """JSON values alone: numbers that are not finite become None, which is a gap in a curve."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


class EventWriter:
    """Appends events to a file; each is one write, so that a reader sees it whole or not yet.

    Opening cuts off what a killed predecessor left of its last line. A write that fails half-way, on a full disk for
    instance, is taken back before its OSError is raised.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        with suppress(OSError):  # a device or pipe in the file's place has no end to look at
            _cut_torn_line(self.fd)

    def append(self, event: Mapping[str, Any]) -> None:
        data = json.dumps(plain(event), separators=(",", ":")).encode() + b"\n"
        before = os.fstat(self.fd).st_size
        try:
            written = os.write(self.fd, data)
            if written < len(data):
                os.write(self.fd, data[written:])
        except OSError:
            with suppress(OSError):
                os.ftruncate(self.fd, before)
            raise

    def sync(self) -> None:
        """Waits until the disk has what was appended."""
        with suppress(OSError):  # a file system that cannot (EINVAL) is no reason to fail a run
            os.fsync(self.fd)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _cut_torn_line(fd: int) -> None:
    size = os.fstat(fd).st_size
    at = size
    while at > 0:
        start = max(0, at - 65536)
        newline = os.pread(fd, at - start, start).rfind(b"\n")
        if newline >= 0:
            at = start + newline + 1
            break
        at = start
    if at != size:
        os.ftruncate(fd, at)


def read_all(path: Path) -> list[dict[str, Any]]:
    """All whole events of a file; [] when there is none."""
    try:
        return _parse(path.read_bytes())[0]
    except FileNotFoundError:
        return []


LOSS = re.compile(rb'"loss":(-?[0-9][0-9.eE+-]*)')


def losses(path: Path) -> list[float]:
    """The training loss of every step: of a file of megabytes in milliseconds, since no line is read beyond it."""
    found = []
    with suppress(OSError), open(path, "rb") as f:
        for line in f:
            if line.startswith(b'{"kind":"step"') and line.endswith(b"\n"):
                match = LOSS.search(line, 0, 400)
                with suppress(ValueError):
                    found.append(float(match[1]) if match else math.nan)
    return [x for x in found if math.isfinite(x)]


def keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Rewrites the file with the wanted events alone, and gives them; readers see the old file or the new one."""
    kept = [e for e in read_all(path) if wanted(e)]
    if not path.exists():
        return kept
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as f:
        f.write(b"".join(json.dumps(e, separators=(",", ":")).encode() + b"\n" for e in kept))
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)
    sync_folder(path.parent)
    return kept


def _parse(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """(events, bytes used): whole lines alone; a line that is no JSON object is left out."""
    end = data.rfind(b"\n") + 1
    events = []
    for line in data[:end].split(b"\n"):
        with suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                events.append(value)
    return events, end


@dataclass
class _Seen:
    """What was read of one file: which file, how many bytes of it, and the events in them."""

    file: tuple[int, int, int]
    offset: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)


class EventReader:
    """Reads growing event files; each call reads only what is new. Remembers the `most` used last. Thread-safe."""

    def __init__(self, most: int = 64) -> None:
        self.most = most
        self.seen: OrderedDict[Path, _Seen] = OrderedDict()
        self.lock = threading.Lock()

    def read(self, path: Path, since: int = 0, generation: int = 0) -> list[dict[str, Any]]:
        """The events from number `since` on. `generation` changes when the file is written anew (inodes come back)."""
        with self.lock:
            try:
                with open(path, "rb") as f:
                    stat = os.fstat(f.fileno())
                    file = (stat.st_dev, stat.st_ino, generation)
                    seen = self.seen.get(path)
                    if seen is None or seen.file != file or stat.st_size < seen.offset:
                        seen = self.seen[path] = _Seen(file)
                    self.seen.move_to_end(path)
                    while len(self.seen) > self.most:
                        self.seen.popitem(last=False)
                    if stat.st_size > seen.offset:
                        f.seek(seen.offset)
                        events, used = _parse(f.read(stat.st_size - seen.offset))
                        seen.events += events
                        seen.offset += used
                    return seen.events[max(0, since) :]
            except FileNotFoundError:
                self.seen.pop(path, None)
                return []

    def forget(self, path: Path) -> None:
        with self.lock:
            self.seen.pop(path, None)
