"""Single tensors out of safetensors files, each read when it is asked for: numpy alone, no model, nothing executed.

    weights = Weights("models/smollm2-135m")      # a file, or a folder with one file or with shards
    weights.read("model.norm.weight")             # float32, from a memory map: the rest stays on the disk
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_core.errors import UserError, nearest

MAX_HEADER = 1 << 20  # bytes: ten thousand tensors; one of 66 MB takes 6 seconds and a gigabyte to read
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
          "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}  # fmt: skip
NUMBERS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
MAX_NAMES = 200_000
INDEX, ONE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where one tensor lies: bytes `begin` to `end` of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a safetensors file says of itself: its tensors in its own order, and its metadata as text."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file, every number in it checked against the file.

    Raises UserError for anything that is not such a file: a header that is too long or no JSON, an unknown number
    format, a tensor whose bytes are not those of its shape, tensors that overlap, leave gaps or end behind the file.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            head = f.read(8)
            length = header_length(head, path, size, MAX_HEADER)
            text = f.read(length)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        told = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no safetensors file: its header is no JSON ({str(error)[:80]})") from None
    if not isinstance(told, dict) or len(told) > MAX_NAMES:
        raise UserError(f"{path} is no safetensors file: its header is no list of tensors")
    metadata = told.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{path} is no safetensors file: its metadata must be texts")
    entries = {name: _entry(path, name, value, 8 + length, size) for name, value in told.items()}
    at = 8 + length
    for name, e in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if e.begin != at:
            raise UserError(f"{path} is no safetensors file: {name[:80]!r} does not begin where the one before it ends")
        at = e.end
    if at != size:
        raise UserError(f"{path} is no safetensors file: it has {size - at:,} bytes that belong to no tensor")
    return Header(entries=entries, metadata=metadata)


def header_length(head: bytes, path: Path, size: int, most: int) -> int:
    """The length that a file's first 8 bytes give its header; UserError for more than `most` or than the file has."""
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > min(most, size - 8):
        raise UserError(f"{path} is no safetensors file: its header claims {length:,} bytes of {size:,}")
    return length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name is there twice")
    "".join(out).encode()  # half of a surrogate pair is no character: UnicodeEncodeError, which is a ValueError
    return out


def _entry(path: Path, name: str, value: Any, start: int, size: int) -> Entry:
    def number(n: Any) -> bool:
        return isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= 1 << 48

    good = isinstance(value, dict) and value.keys() == {"dtype", "shape", "data_offsets"}
    shape: Any = value["shape"] if good else None
    at: Any = value["data_offsets"] if good else None
    good = (good and isinstance(shape, list) and len(shape) < 9 and all(map(number, shape))
            and isinstance(at, list) and len(at) == 2 and all(map(number, at)))  # fmt: skip
    if not good:
        raise UserError(f"{path} is no safetensors file: the entry of {name[:80]!r} is no tensor")
    width = WIDTHS.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if width is None:
        raise UserError(f"{path}: {name[:80]!r} is of numbers {str(value['dtype'])[:20]!r}, which are not known here")
    if at[1] - at[0] != width * math.prod(shape) or start + at[1] > size:
        raise UserError(f"{path} is no safetensors file: {name[:80]!r} has not the bytes of its shape {tuple(shape)}")
    return Entry(file=path, dtype=value["dtype"], shape=tuple(shape), begin=start + at[0], end=start + at[1])


def read_entry(name: str, entry: Entry) -> np.ndarray:
    """One tensor, float32 (float64 if it is stored so). UserError for whole numbers and for what is not finite."""
    if entry.dtype != "BF16" and entry.dtype not in NUMBERS:
        raise UserError(f"{entry.file}: {name} is {entry.dtype}; what can be compared is F64, F32, F16 or BF16")
    count = math.prod(entry.shape)
    kind = np.dtype(np.uint16 if entry.dtype == "BF16" else NUMBERS[entry.dtype]).newbyteorder("<")
    raw = np.memmap(entry.file, kind, "r", entry.begin, (count,)) if count else np.zeros(0, kind)
    if entry.dtype == "BF16":  # its bits are the upper half of a float32
        value = np.left_shift(raw, np.uint32(16), dtype=np.uint32).view(np.float32)
    else:
        value = np.array(raw, np.float32 if entry.dtype == "F16" else NUMBERS[entry.dtype])
    if not np.isfinite(value).all():
        raise UserError(f"{entry.file}: {name} holds a number that is not finite (NaN or infinity)")
    return value.reshape(entry.shape)


class Weights:
    """The tensors of a safetensors file, of a folder's model.safetensors, or of its shards."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        headers = [read_header(p) for p in _files(self.path)]
        self.entries: dict[str, Entry] = {}
        for h in headers:
            self.entries |= h.entries
        self.metadata: dict[str, str] = {k: v for h in headers for k, v in h.metadata.items()}

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[self._known(name)].shape

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32 (float64 if it is stored so); UserError for a name that is not there."""
        return read_entry(name, self.entries[self._known(name)])

    def _known(self, name: str) -> str:
        if name not in self.entries:
            close = nearest(name, list(self.entries)[:2000])
            hint = f" (did you mean {close}?)" if close else ""
            raise UserError(f"{self.path} has no tensor {name}{hint}")
        return name


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"there is nothing at {path}")
    if (path / ONE).is_file():
        return [path / ONE]
    if (path / INDEX).is_file():
        from lora_core.peft_format import read_json

        names = read_json(path / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
            raise UserError(f"{path / INDEX} does not say which tensor is in which file")
        return [path / n for n in dict.fromkeys(names.values())]
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise UserError(f"{path} has {len(found) or 'no'} safetensors files; a model has {ONE}, or shards and {INDEX}")
    return found
