"""A run's curve as a TensorBoard event file, for those who collect their runs there.

The format is TFRecord around the protocol buffer tensorflow.Event: a length (uint64, little endian) and its checksum,
the bytes and theirs. Only what scalars need is written: wall_time (field 1), step (2), file_version (3), summary (5).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SCALARS = {"loss": "loss/training", "lr": "learning_rate", "grad_norm": "gradient_norm", "tokens_per_s": "tokens_per_s"}
HELD = "loss/held_out"
POLYNOMIAL = 0x82F63B78  # Castagnoli, reflected: CRC-32C (RFC 3720)
MASK = 0xA282EAD8


def _table() -> tuple[int, ...]:
    found = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (POLYNOMIAL if value & 1 else 0)
        found.append(value)
    return tuple(found)


TABLE = _table()


def crc32c(data: bytes) -> int:
    """CRC-32C; not zlib's, which has another polynomial."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    """The checksum as TFRecord stores it."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + MASK) & 0xFFFFFFFF)


def record(data: bytes) -> bytes:
    """One TFRecord."""
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def sized(field: int, data: bytes) -> bytes:
    """A field of a protocol buffer that holds bytes, text or a message."""
    return varint(field << 3 | 2) + varint(len(data)) + data


def scalar(wall_time: float, step: int, values: Mapping[str, float]) -> bytes:
    """An Event with one summary value for each tag."""
    summary = b"".join(sized(1, sized(1, tag.encode()) + varint(2 << 3 | 5) + struct.pack("<f", value))
                       for tag, value in values.items())  # fmt: skip
    return varint(1 << 3 | 1) + struct.pack("<d", wall_time) + varint(2 << 3) + varint(step) + sized(5, summary)


def event_file(events: Sequence[Mapping[str, Any]], began: float) -> bytes:
    """The bytes of an event file of a run's events; `began` is when it started, in seconds since 1970.

    Tags: loss/training, loss/held_out, learning_rate, gradient_norm, tokens_per_s, and the mean and the largest ‖ΔW‖ of
    its matrices as update_norm/mean and update_norm/largest.
    """
    version = varint(1 << 3 | 1) + struct.pack("<d", began) + sized(3, b"brain.Event:2")
    return record(version) + b"".join(
        record(scalar(began + float(e.get("seconds") or 0.0), step, values)) for e, step, values in scalars(events)
    )


def scalars(events: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], int, dict[str, float]]]:
    """(event, step, {tag: value}) of each event that has something to draw."""
    for e in events:
        if e.get("kind") not in ("base", "step", "held"):
            continue
        values = {tag: e.get(name) for name, tag in SCALARS.items()} if e["kind"] == "step" else {}
        values[HELD] = e.get("held_loss")
        if norms := list((e.get("norms") or {}).values()):
            values |= {"update_norm/mean": sum(norms) / len(norms), "update_norm/largest": max(norms)}
        found = {tag: float(v) for tag, v in values.items() if isinstance(v, (int, float))}
        if found:
            yield e, int(e.get("step") or 0), found
