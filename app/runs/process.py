"""Whether a process lives, and whose a run's folder is: pids with start times, and a lock that dies with its owner."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

LOCK, HEARTBEAT, STOP = "lock", "heartbeat", "stop"
BEAT_S = 1.0


def identity(pid: int) -> str | None:
    """What tells a living process from a later one with the same number; None for a dead one and for a zombie.

    On Linux the boot and the start in ticks since then, which no change of the clock moves; else the start time.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as f:
            fields = f.read().rpartition(")")[2].split()  # the name before may hold blanks and brackets
        if fields[0] in "ZX":
            return None
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:
            return f"{f.read().strip()}:{fields[19]}"  # field 22 of the line
    except (OSError, IndexError):
        pass
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except (psutil.Error, ValueError):
        return None


class Lock:
    """The right to work on a run's folder: `flock`, which the system takes back when the process ends, however.

    It is not handed on to programs that the holder starts. `take` waits a moment, since `held` holds it for an instant.
    """

    def __init__(self, folder: Path, name: str = LOCK) -> None:
        self.path = folder / name
        self.fd = -1

    def take(self, wait_s: float = 1.0) -> bool:
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        until = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.fd = fd
                return True
            except BlockingIOError:
                if time.monotonic() >= until:
                    os.close(fd)
                    return False
                time.sleep(0.02)

    def release(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def held(folder: Path, name: str = LOCK) -> bool:
    """Whether some process works on this folder now."""
    try:
        fd = os.open(folder / name, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def alive(folder: Path, pid: int | None, process: str | None) -> bool:
    """Whether the worker of a run lives: the very process that was noted, or whoever holds the folder's lock."""
    if pid is not None and process is not None and identity(pid) == process:
        return True
    return held(folder)


class Heartbeat:
    """Touches a file once a second from a thread, so that others see a process that hangs from one that works."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / HEARTBEAT
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _beat(self) -> None:
        while True:
            with suppress(OSError):
                self.path.touch()
            if self.over.wait(BEAT_S):
                return


def heartbeat_age(folder: Path) -> float | None:
    """Seconds since the last heartbeat, or None when there never was one."""
    try:
        return max(0.0, time.time() - (folder / HEARTBEAT).stat().st_mtime)
    except OSError:
        return None


def oom_kills() -> int:
    """How many processes the system has killed for want of memory: in this container if that is known, or at all."""
    for path in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        with suppress(OSError, ValueError), open(path, encoding="ascii") as f:
            for line in f:
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return 0


def be_modest() -> None:
    """Let the page go first, and if memory runs out let this process be the one that the system ends."""
    with suppress(OSError):
        os.nice(5)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as f:
        f.write("800")
