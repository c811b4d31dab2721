"""A worker that waits for its run, with all that a training needs imported: the first step comes some seconds sooner.

The queue starts one when nothing has been trained for a while. It waits at its standard input for a run's folder, and
ends when that is closed: by the queue, or by the system when the server is gone, however.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from app.runs.fits import free_memory
from app.runs.session import LATER

REST_S = 8.0  # without a training before one is started: the page that opens comes first
LEAST = 2 << 30  # bytes of memory that must be free for it
WAIT = "--wait"
NEEDED = ("app.runs.together", "lora_core", "lora_core.train", "lora_core.adapter", "lora_core.models", *LATER,
          "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
          "transformers.models.llama.modeling_llama")  # fmt: skip


class Spare:
    """At most one waiting worker. Not to be used by two threads at a time."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.command, self.folder = (*command, WAIT), folder
        self.process: subprocess.Popen[bytes] | None = None
        self.busy = time.monotonic()

    def look(self, idle: bool, env: Callable[[], dict[str, str]]) -> None:
        """Start it after a while of rest, if the memory allows it; one that has died is started anew."""
        if not idle:
            self.busy = time.monotonic()
        elif self.process is not None:
            if self.process.poll() is not None:
                self.process, self.busy = None, time.monotonic() + 60
        elif time.monotonic() - self.busy > REST_S and free_memory() > LEAST:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                            stderr=subprocess.DEVNULL, cwd=self.folder, env=env(),
                                            start_new_session=True)  # fmt: skip

    def give(self, run: Path) -> subprocess.Popen[bytes] | None:
        """Let it train this run; None where there is none that lives."""
        process, self.process = self.process, None
        if process is None or process.poll() is not None or process.stdin is None:
            return None
        try:
            process.stdin.write(os.fsencode(run) + b"\n")
            process.stdin.close()
        except OSError:  # it has just died
            return None
        return process

    def end(self) -> None:
        if self.process is not None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        self.process = None


def wait() -> str | None:
    """The waiting worker's own part: import, wait, and write into the run's log from then on. None: nobody needs it."""
    for name in NEEDED:
        with suppress(ImportError):  # it is told where it is needed
            importlib.import_module(name)
    line = os.fsdecode(sys.stdin.buffer.readline()).rstrip("\n")
    if not line:
        return None
    with suppress(OSError), open(Path(line) / "log.txt", "ab") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    return line
