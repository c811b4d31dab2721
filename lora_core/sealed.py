"""Checkpoint files that show whether they are whole: safetensors with the SHA-256 of all their bytes in the header.

Where a bit has changed on the disk or the end is missing, the checkpoint before it is taken: nobody goes on from wrong
numbers. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.home import sync_folder, write

KEY = b'"sha256":"'  # no other text of a header can hold this: quotation marks within a value are escaped
EMPTY = b"0" * 64
MOST_HEADER = 64 << 20


def before(file: Path) -> Path:
    """The name of the checkpoint before the last one."""
    return file.with_name(f"before-{file.name}")


def damaged(file: Path) -> Path:
    """The name of a checkpoint that was put aside."""
    return file.with_name(f"damaged-{file.name}")


def save_sealed(file: Path, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write tensors (all torch's or all numpy's) and a JSON object; the file that was there becomes `before(file)`.

    Raises OSError when there is no room; then what was there still is.
    """
    if any(not hasattr(t, "ctypes") for t in tensors.values()):
        from safetensors.torch import save
    else:
        from safetensors.numpy import save
    data = save(dict(tensors), {"state": json.dumps(state), "sha256": EMPTY.decode()})
    at = data.index(KEY) + len(KEY)
    view = memoryview(data)
    digest = hashlib.sha256(data).hexdigest().encode()
    write(file, view[:at], digest, view[at + len(EMPTY) :], keep=before(file))


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One that is whole. step: the last of its steps; state: the JSON object that was saved with it."""

    path: Path
    state: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


def newest(file: Path) -> Checkpoint | None:
    """The last whole checkpoint, be it `file` or the one before it; None where there is none."""
    for path in (file, before(file)):
        state = read_state(path)
        if state is not None:
            return Checkpoint(path=path, state=state)
    return None


def put_aside(file: Path) -> bool:
    """Rename a checkpoint that is damaged to `damaged(file)`, so that its name is free; whether there was one."""
    found = [path for path in (before(file), file) if path.exists() and read_state(path) is None]
    for path in found:
        os.replace(path, damaged(file))
    if found:
        sync_folder(file.parent)
    return bool(found)


def remove(file: Path) -> None:
    """Delete a checkpoint and the one before it."""
    for path in (before(file), file):  # in this order: what a kill between the two leaves is the newer one
        path.unlink(missing_ok=True)


def read_state(path: Path) -> dict[str, Any] | None:
    """The JSON object saved in a checkpoint (with "step", a whole number), or None where the file is damaged.

    A file of a version that wrote no digest is looked at as far as that goes: its header and its length.
    """
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = f.read(8)
            n = int.from_bytes(length, "little")
            if len(length) < 8 or n > min(MOST_HEADER, size - 8):
                return None
            header = f.read(n)
            told = json.loads(header)
            meta = told.pop("__metadata__")
            if 8 + n + max((t["data_offsets"][1] for t in told.values()), default=0) != size:
                return None
            if meta.keys() != {"state"} and not _fits(f, length, header, meta["sha256"]):
                return None
        state = json.loads(meta["state"])
        return state if isinstance(state["step"], int) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None


def _fits(file: Any, length: bytes, header: bytes, digest: str) -> bool:
    """Whether the digest is that of the file, `file` being read up to the end of its header."""
    at = header.index(KEY) + len(KEY)
    seen = hashlib.sha256(length)
    seen.update(header[:at] + EMPTY + header[at + len(EMPTY) :])
    while block := file.read(1 << 20):
        seen.update(block)
    return seen.hexdigest() == digest
