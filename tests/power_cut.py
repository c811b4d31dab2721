"""A power cut between any two writes: counts what a process asks of the disk, and ends it at a given number.

Counted is what our own writing functions do: opening for writing, write, fsync, rename, unlink, mkdir, rmdir, truncate.
What is lost at the cut: "nothing" (as at a kill), "data" (bytes that no fsync has asked for), or "names" (also renames
that no fsync of their folder has asked for). The heartbeat's file and a test's own trace are no part of it.
"""

from __future__ import annotations

import builtins
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

Lose = Literal["nothing", "data", "names"]
CUT = 77  # exit status of a process that was cut off
IGNORED = ("heartbeat", "trace", "log.txt")


class PowerCut:
    """Armed once, in a process of its own. `at`: the operation before which the power goes; 0: never, but count."""

    def __init__(self, root: Path, at: int, lose: Lose) -> None:
        self.root, self.at, self.lose = str(root), at, lose
        self.count = 0
        self.files: dict[tuple[int, int], tuple[int, int]] = {}  # file: (a handle of it, bytes that are safe)
        self.renamed: list[tuple[str, str, str | None]] = []  # from, to, where the file is kept that had the name
        self.kept = tempfile.mkdtemp(prefix="kept-", dir=root.parent)
        self.real: dict[str, Any] = {}

    def arm(self) -> PowerCut:
        for name in ("write", "fsync", "rename", "replace", "unlink", "remove", "mkdir", "rmdir", "ftruncate"):
            self.real[name] = getattr(os, name)
        os.write = self._write
        os.fsync = self._fsync
        os.ftruncate = self._ftruncate
        os.rename = os.replace = self._rename  # type: ignore[assignment]
        for name in ("unlink", "remove", "mkdir", "rmdir"):
            setattr(os, name, self._counted(name))
        self.real["open"] = io.open
        io.open = builtins.open = self._open  # type: ignore[assignment]
        return self

    # ---- the operations
    def step(self, path: Any) -> None:
        """One more operation is about to be done."""
        text = os.fspath(path)
        if not str(text).startswith(self.root) or Path(text).name in IGNORED:
            return
        self.count += 1
        if self.count == self.at:
            self._cut()

    def _counted(self, name: str) -> Callable[..., Any]:
        def operation(path: Any, *more: Any, **named: Any) -> Any:
            folder = named.get("dir_fd")
            self.step(path if folder is None else os.path.join(path_of(folder), path))
            return self.real[name](path, *more, **named)

        return operation

    def _write(self, fd: int, data: Any) -> int:
        self._before(fd)
        return self.real["write"](fd, data)

    def _ftruncate(self, fd: int, length: int) -> None:
        self.step(path_of(fd))
        self.real["ftruncate"](fd, length)

    def _before(self, fd: int) -> None:
        """Note how much of a file is safe, before it gets more."""
        stat = os.fstat(fd)
        key = (stat.st_dev, stat.st_ino)
        path = path_of(fd)
        if path.startswith(self.root) and Path(path).name not in IGNORED and key not in self.files:
            self.files[key] = (os.open(path, os.O_RDWR), stat.st_size)
        self.step(path)

    def _fsync(self, fd: int) -> None:
        path = path_of(fd)
        self.step(path)
        self.real["fsync"](fd)
        stat = os.fstat(fd)
        if os.path.isdir(path):
            self.renamed = [r for r in self.renamed if path not in (os.path.dirname(r[0]), os.path.dirname(r[1]))]
        elif (key := (stat.st_dev, stat.st_ino)) in self.files:
            self.files[key] = (self.files[key][0], stat.st_size)

    def _rename(self, source: Any, target: Any, **named: Any) -> None:
        self.step(source)
        a, b = os.path.abspath(source), os.path.abspath(target)
        kept = None
        if self.lose == "names" and os.path.isfile(b):
            kept = os.path.join(self.kept, str(len(os.listdir(self.kept))))
            shutil.copy2(b, kept)
        self.real["replace"](source, target)
        if a.startswith(self.root):
            self.renamed.append((a, b, kept))

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *more: Any, **named: Any) -> Any:
        writes = any(c in mode for c in "wax+")
        if not writes or isinstance(file, int) or not os.fspath(file).startswith(self.root):
            return self.real["open"](file, mode, buffering, *more, **named)
        if Path(file).name in IGNORED:
            return self.real["open"](file, mode, buffering, *more, **named)
        self.step(file)
        raw = _File(file, mode.replace("b", "").replace("t", ""), self)
        if "b" in mode and buffering == 0:
            return raw
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding=named.get("encoding"))

    # ---- the end
    def _cut(self) -> None:
        if self.lose != "nothing":
            for handle, safe in self.files.values():
                if os.fstat(handle).st_size > safe:
                    self.real["ftruncate"](handle, safe)
        if self.lose == "names":
            for source, target, kept in reversed(self.renamed):
                if os.path.exists(target):
                    self.real["replace"](target, source)
                if kept is not None:
                    self.real["replace"](kept, target)
        os._exit(CUT)


class _File(io.FileIO):
    """A file whose writes are counted, one by one."""

    def __init__(self, path: Any, mode: str, cut: PowerCut) -> None:
        super().__init__(path, mode)
        self.cut = cut

    def write(self, data: Any, /) -> int:
        self.cut._before(self.fileno())
        return super().write(data)


def path_of(fd: int) -> str:
    """The name of an open file (Linux)."""
    return os.readlink(f"/proc/self/fd/{fd}")
