"""Whether a process lives, and whose a run's folder is: pids with start times, and a lock that dies with its owner."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

LOCK, HEARTBEAT, STOP = "lock", "heartbeat", "stop"
BEAT_S, SILENT_S = 1.0, 20.0  # between heartbeats; without one for so long a process is said to be silent


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

    @property
    def good(self) -> bool:
        """Whether it is held, and its file is still the one of that name (the folder may have been deleted)."""
        if self.fd < 0:
            return False
        try:
            return os.path.samestat(os.fstat(self.fd), os.stat(self.path))
        except OSError:
            return False

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


def suspended(pid: int) -> bool:
    """Whether somebody has stopped a process for a while (Ctrl-Z in a terminal, a debugger)."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except (psutil.Error, ValueError):
        return False


class Signs:
    """Signs of life of the thread that trains: `seen()` at each; `quiet` when the next one is long overdue.

    A step may take milliseconds or a minute, so overdue is twenty times the longest wait so far, and ten minutes at
    least. While `patient` (a model is fetched and loaded, which takes what it takes) nothing is overdue.
    """

    LEAST_S, TIMES = 600.0, 20.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.patient = clock, False
        self.last, self.longest = clock(), 0.0

    def seen(self) -> None:
        now = self.clock()
        if not self.patient:
            self.longest = max(self.longest, now - self.last)
        self.last = now

    @property
    def quiet(self) -> bool:
        return not self.patient and self.clock() - self.last > max(self.LEAST_S, self.TIMES * self.longest)


class Heartbeat:
    """Writes the time into a file once a second from a thread, so that others see a process that hangs.

    Not while the `signs` of the training thread are overdue. The time is that of the clock that nobody sets.
    """

    def __init__(self, folder: Path, signs: Signs | None = None) -> None:
        self.path, self.signs = folder / HEARTBEAT, signs
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
            if self.signs is None or not self.signs.quiet:
                with suppress(OSError), open(self.path, "r+b" if self.path.exists() else "wb") as f:
                    f.write(b"%020.3f" % time.monotonic())  # over the old one: a full disk has room for that
            if self.over.wait(BEAT_S):
                return


def last_beat(folder: Path) -> float | None:
    """When the last heartbeat was, on the monotonic clock of the machine; None when that is not known."""
    try:
        return float((folder / HEARTBEAT).read_bytes())
    except (OSError, ValueError):
        return None


def heartbeat_age(folder: Path) -> float | None:
    """Seconds since the last heartbeat, whatever became of the clock; None when there was none since the start."""
    beat = last_beat(folder)
    age = None if beat is None else time.monotonic() - beat
    return None if age is None or age < 0 else age  # below zero: the machine was started anew


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
        os.nice(10)  # a page that thirty people open at once comes before the training
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as f:
        f.write("800")
