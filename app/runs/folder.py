"""A run's folder: how its files get their names, and what a kill between two steps may leave behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import apsw

from app.runs import events
from lora_core.errors import UserError, unknown
from lora_core.home import WHY, sync_folder

ADAPTER, CHECKPOINT, LOG = "adapter", "checkpoint.safetensors", "log.txt"


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
    (folder / f"{name}{suffix}").write_bytes(data)


def save_adapter(folder: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write the adapter to a folder that then takes its name; one that was there stays until then."""
    new, old, final = folder / f".{ADAPTER}.new", folder / f".{ADAPTER}.old", folder / ADAPTER
    shutil.rmtree(new, ignore_errors=True)
    try:
        save(new)
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
        part.unlink(missing_ok=True)


def trim(folder: Path) -> list[dict[str, Any]]:
    """Drop the events that will come again, so that a resumed run's curve has each step once; gives those that stay."""
    step = checkpoint_step(folder / CHECKPOINT)

    def stays(event: dict[str, Any]) -> bool:
        return step is not None and event.get("step", 0) <= step and event.get("kind") in ("base", "step", "held")

    return events.keep(folder / events.NAME, stays)


def checkpoint_step(path: Path) -> int | None:
    """The step that a checkpoint was written after; None when there is none. An unreadable one is put aside."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(str(path), "np") as f:
            return int(json.loads((f.metadata() or {})["state"])["step"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        os.replace(path, path.with_name(f"damaged-{path.name}"))
        return None


def sentence(error: BaseException, folder: Path) -> str:
    """One line for a person; the traceback is in log.txt."""
    text = " ".join(str(error).split())
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
