"""Where LoRA Lab keeps what it made: models, runs, what it measured. No torch here.

`LORA_LAB_HOME` names the folder; without it, it is the platform's cache folder (on Linux ~/.cache/lora-lab).
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_core.errors import UserError

FULL = "No space left on device"
WHY = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
    errno.ENOTDIR: "a file is in the way of the folder",
    errno.EEXIST: "a file is in the way of the folder",
}


def home() -> Path:
    """The folder that LoRA Lab writes to, made if it is not there.

    Raises UserError when it cannot be made: the disk is full, it is read-only, or a file has its name.
    """
    folder = home_path()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def home_path() -> Path:
    """Where `home()` is, without making it."""
    given = os.environ.get("LORA_LAB_HOME", "").strip()
    if given:
        return Path(given).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("lora-lab", appauthor=False)).absolute()


@contextmanager
def writing(where: Path | str) -> Iterator[None]:
    """Turns the system's refusal to write (full, read-only, not allowed) into a UserError that names the folder."""
    try:
        yield
    except Exception as error:
        # safetensors has an error class of its own, with the system's words in it
        number = error.errno if isinstance(error, OSError) else errno.ENOSPC if FULL in str(error) else None
        if number not in WHY or isinstance(error, UserError):
            raise
        raise UserError(
            f"cannot write to {where}: {WHY[number]}; "
            "make room there, or name another folder with the environment variable LORA_LAB_HOME"
        ) from error


def sync_folder(folder: Path) -> None:
    """Asks the disk to keep the folder's entries; a no-op where folders cannot be opened (Windows)."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as JSON."""
    write_text(path, json.dumps(value, indent=1))


def write_text(path: Path, text: str) -> None:
    """`write` of a text as UTF-8."""
    write(path, text.encode("utf-8"))


def write(path: Path, *pieces: bytes | memoryview, keep: Path | None = None) -> None:
    """Writes a file so that a reader finds the old bytes or the new ones, never half of them, whatever is cut off.

    The bytes are on the disk before they get the file's name, and the name is there when this returns.
    keep: the name that the file which was there gets. Between the two renames there is only that one.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
    sync_folder(path.parent)


def read_json(path: Path, limit: int = 1 << 20) -> Any:
    """The value of a JSON file of at most `limit` bytes, or None when it is absent, too big or no JSON."""
    try:
        if path.stat().st_size > limit:
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
