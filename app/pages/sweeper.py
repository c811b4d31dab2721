"""Clears up at the start and each minute: what was sent and is old, what was broken off, what others' code leaves."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

from app.pages import owners
from app.pages.lab import Lab
from app.pages.take import FOLDER
from app.pages.uploads import swept

EVERY_S = 60.0
HOUR_S = 3600.0
logger = logging.getLogger("lora_lab.page")


class Sweeper:
    """A thread of the server. `boot` clears up once and then each minute; `close` ends it."""

    def __init__(self, lab: Lab, every_s: float = EVERY_S) -> None:
        self.lab, self.home, self.every_s = lab, lab.store.root.parent, every_s
        self.over = threading.Event()
        self.thread: threading.Thread | None = None

    def boot(self) -> None:
        if self.thread is None:
            self.once()
            self.thread = threading.Thread(target=self._work, name="sweeper", daemon=True)
            self.thread.start()

    def close(self) -> None:
        self.over.set()
        if self.thread is not None:
            self.thread.join()

    def _work(self) -> None:
        while not self.over.wait(self.every_s):
            try:
                self.once()
            except Exception:
                logger.exception("clearing up")

    def once(self) -> None:
        """Remove what nobody can want any more; and look how much lies here of everybody together."""
        self.lab.uploads.sweep()
        self.lab.sets.sweep()
        self.lab.store.sweep()
        swept(self.home / "gradio", HOUR_S)
        for left in (self.home / FOLDER).glob("*"):
            if left.is_dir() or left.suffix == ".part":
                with suppress(OSError):
                    if time.time() - left.stat().st_mtime > HOUR_S:
                        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
        for person in self.home.glob(f"{owners.PEOPLE}/*"):
            for empty in (*person.glob("*"), person):
                with suppress(OSError):  # it holds something
                    empty.rmdir()
        owners.crowd(size(self.home / owners.PEOPLE))


def size(folder: Path) -> int:
    """Bytes of all files below a folder; files that go meanwhile count nothing."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
