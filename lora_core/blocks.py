"""The tensors of a stored adapter's file as blocks, whose ranks can change; and safetensors' header. Numpy alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_core.peft_format import PREFIX, Parts, as_parameter, unit_key
from lora_core.stored import Stored, StoredSite

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # {tensor: (dtype, shape)}


@dataclass(frozen=True, kw_only=True)
class Block:
    """The matrices that share the tensors of one weight (full, in), or of one parameter of experts (experts, full, in).

    also: other modules with the same update, and whether theirs is written transposed; experts: 0 for a plain weight.
    """

    path: str
    param: str
    name: str  # by which PEFT looks up its rank
    full: int
    in_: int
    lookup: bool
    experts: int = 0
    sites: list[StoredSite] = field(default_factory=list)
    also: dict[str, bool] = field(default_factory=dict)

    def rank(self, ranks: Mapping[str, int]) -> int:
        """Of the tensors: slices stand side by side, experts behind one another with one rank."""
        each: dict[int | None, int] = {}
        for s in self.sites:
            each[s.expert] = each.get(s.expert, 0) + ranks[s.key]
        return max(each.values())

    def names(self, depth: int) -> list[tuple[str, str, bool]]:
        """(name of A, name of B, whether they hold Bᵀ and Aᵀ) of every module that has this update."""
        out = []
        for path, swap in {self.path: False, **self.also}.items():
            base = f"{PREFIX}{path}{'.base_layer' * depth}."
            kind = "lora_embedding_{}" if self.lookup != swap else "lora_{}.weight"
            out.append((base + kind.format("A"), base + kind.format("B"), swap))
        return out

    def shapes(self, rank: int, depth: int) -> dict[str, tuple[int, ...]]:
        """{tensor: shape} at this rank."""
        r, out = rank * (self.experts or 1), {}
        for a, b, swap in self.names(depth):
            A, B = (r, self.in_), (self.full, r)
            out |= {a: B[::-1], b: A[::-1]} if swap else {a: A, b: B}
        return out

    def tensors(self, cuts: Mapping[str, tuple[np.ndarray, np.ndarray]], rank: int,
                depth: int) -> dict[str, np.ndarray]:  # fmt: skip
        """{tensor: its float32 numbers} from {matrix: (B (out, k), A (k, in))}."""
        n = self.experts or 1
        A, B = np.zeros((n, rank, self.in_), np.float32), np.zeros((self.full, rank, n), np.float32)
        col = [0] * n
        for s in self.sites:
            b, a = cuts[s.key]
            e = s.expert or 0
            cols = slice(col[e], col[e] + len(a))
            col[e] = cols.stop
            A[e, cols] = a
            B[s.layout.rows() if s.layout else slice(None), cols, e] = b
        flat_A, flat_B = A.reshape(n * rank, self.in_), B.reshape(self.full, rank * n)
        return {name: v for a, b, swap in self.names(depth)
                for name, v in ((a, flat_B.T if swap else flat_A), (b, flat_A.T if swap else flat_B))}  # fmt: skip


def twins_of(stored: Stored) -> dict[str, str]:
    """{head: embedding} of PEFT's tied adapters, whose update is stored twice, the second one transposed."""
    lookups = [t for t in stored.sites.values() if t.lookup]
    return {s.key: t.key for s in stored.sites.values() if not s.lookup and stored.spec is None for t in lookups
            if s.scaling == t.scaling and np.array_equal(s.A, t.B.T) and np.array_equal(s.B, t.A.T)}  # fmt: skip


def blocks_of(stored: Stored, parts: Parts, twins: Mapping[str, str]) -> list[Block]:
    found: dict[tuple[str, str], Block] = {}
    count = Counter((u.path, u.param) for u in parts.units.values())
    for s in stored.sites.values():
        if s.key in twins:
            continue
        u = parts.units[unit_key(s.path, s.param, s.expert)]
        plain = s.param == "weight" and not as_parameter(stored.config, s.path)
        place = s.path, s.param
        if place not in found:
            found[place] = Block(path=s.path, param=s.param, name=s.path if plain else ".".join(place),
                                 full=u.B.shape[0], in_=u.A.shape[1], lookup=u.lookup,
                                 experts=0 if s.expert is None else count[place])  # fmt: skip
        block = found[place]
        block.sites.append(s)
        block.also.update({other: parts.units[other].lookup != u.lookup for other in s.also})
        block.also.update({t: True for t, key in twins.items() if key == s.key})
    return list(found.values())


# ---- safetensors -------------------------------------------------------------------------------------------------
def ordered(shapes: Shapes) -> list[str]:
    """Wide numbers first, so that all are aligned; then by name."""
    return sorted(shapes, key=lambda n: (-SIZES[shapes[n][0]], n))


def header_of(shapes: Shapes) -> bytes:
    """The length of the header in 8 bytes, then the header, padded with spaces to a multiple of 8."""
    d: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for n in ordered(shapes):
        dtype, shape = shapes[n]
        end = at + SIZES[dtype] * math.prod(shape)
        d[n] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(d, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def entries_length(shapes: Mapping[str, tuple[int, ...]], room: int) -> int:
    """At least what these tensors take in the header of a file of so many bytes."""
    entry = {"dtype": "F32", "data_offsets": [room, room]}
    text = json.dumps({n: {**entry, "shape": s} for n, s in shapes.items()}, separators=(",", ":"), ensure_ascii=False)
    return len(text.encode()) - 1  # of the braces around it one is a comma
