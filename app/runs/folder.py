"""A run's folder: how its files get their names, and what a kill between two steps may leave behind."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import apsw
import psutil

from app.runs import events
from lora_core.errors import UserError, unknown
from lora_core.home import WHY, sync_folder, write
from lora_core.sealed import newest, put_aside

ADAPTER, CHECKPOINT, LOG = "adapter", "checkpoint.safetensors", "log.txt"
PART = re.compile(r"\..+\.(\d+)\.(part|tmp)", re.ASCII)  # .name.pid.part: a file that is being written


def copy_data(source: Path, folder: Path, name: str) -> None:
    """Copies a user's data file into a run's folder, under a name of ours."""
    from lora_core.tasks.data_files import EXTENSIONS, MOST_BYTES

    suffix = source.suffix.lower()
    if suffix not in EXTENSIONS:
        raise unknown("reader for files that end in", source.suffix or source.name, EXTENSIONS)
    try:
        with open(source, "rb") as f:
            data = f.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or error}") from error
    if len(data) > MOST_BYTES:
        raise UserError(f"{source.name} is larger than {MOST_BYTES // 2**20} MB; give a smaller file")
    write(folder / f"{name}{suffix}", data)


def save_adapter(folder: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write the adapter to a folder that then takes its name; one that was there stays until then."""
    new, old, final = folder / f".{ADAPTER}.new", folder / f".{ADAPTER}.old", folder / ADAPTER
    shutil.rmtree(new, ignore_errors=True)
    try:
        save(new)
        sync_folder(new)
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)
        os.rename(new, final)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        tidy(folder)
        raise
    sync_folder(folder)
    shutil.rmtree(old, ignore_errors=True)


def tidy(folder: Path) -> None:
    """What a kill between two renames left: the old adapter gets its name back, half-written files go."""
    old, final = folder / f".{ADAPTER}.old", folder / ADAPTER
    with suppress(OSError):
        if old.exists() and not final.exists():
            os.rename(old, final)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(folder / f".{ADAPTER}.new", ignore_errors=True)
    for part in folder.glob(".*.part"):
        with suppress(OSError):
            part.unlink()


def of_dead_processes(files: Iterable[Path]) -> Iterator[Path]:
    """Those of the files that were being written (.name.pid.part) by a process that is no more, or for a day."""
    for path in files:
        if match := PART.fullmatch(path.name):
            with suppress(OSError):
                if not psutil.pid_exists(int(match[1])) or time.time() - path.lstat().st_mtime > 86_400:
                    yield path


def trim(folder: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Drop the events that will come again, so that a resumed run's curve has each step once.

    Gives those that stay, and a remark when a damaged checkpoint was put aside and the one before it is taken.
    """
    torn = put_aside(folder / CHECKPOINT)
    found = newest(folder / CHECKPOINT)

    def stays(event: dict[str, Any]) -> bool:
        if found is None or event.get("kind") not in ("base", "step", "held"):
            return False
        return event.get("step", 0) <= found.step

    kept = events.keep(folder / events.NAME, stays)
    where = f"goes on from step {found.step}, the checkpoint before" if found else "begins anew"
    return kept, f"the last checkpoint was damaged and is put aside: the run {where}" if torn else None


def sentence(error: BaseException, folder: Path) -> str:
    """One line for a person; the traceback is in log.txt."""
    text = " ".join(str(error).split())
    if not folder.is_dir():
        return f"its folder {folder} is gone; it was deleted while the run was trained"
    number = error.errno if isinstance(error, OSError) else errno.ENOSPC if isinstance(error, apsw.FullError) else None
    if number in WHY:
        return f"cannot write the run to {folder}: {WHY[number]}; make room and resume the run"
    if isinstance(error, UserError):
        return text
    if isinstance(error, MemoryError) or "alloc" in text and "memory" in text or "out of memory" in text.lower():
        return "memory ran out; try a smaller batch, shorter rows or a smaller model"
    return f"training failed ({type(error).__name__}: {text[:200]}); log.txt in the run's folder says where"


def log(folder: Path, text: str) -> None:
    """Add to the run's log; a full disk is no reason to fail once more."""
    with suppress(OSError), open(folder / LOG, "a", encoding="utf-8", errors="replace") as f:
        f.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{text.rstrip()}\n")
