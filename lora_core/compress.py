"""A smaller adapter out of a stored one: the best cut of every ΔW (Eckart–Young), in PEFT's format. No model, no torch.

Cut is s·B·A of each matrix, to its own rank; with DoRA the magnitudes stand as they are. A matrix of rank 0 is left
out. How many directions each keeps is chosen here; cut_open.py writes what is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_core.allocate import allocate
from lora_core.blocks import Block, entries_length
from lora_core.cut_open import NOTHING, Compressed, CutOpen
from lora_core.errors import UserError, unknown
from lora_core.files import read_adapter
from lora_core.peft_format import CONFIG, PREFIX

MB = 1_000_000


def compress(folder: str | Path, out: str | Path, *, rank: int | None = None, energy: float | None = None,
             mb: float | None = None, ranks: Mapping[str, int] | None = None,
             strength: float = 1.0) -> Compressed:  # fmt: skip
    """Cut a stored adapter and write the result to `out`, in PEFT's format, each matrix with its own rank.

    rank    every matrix keeps its first `rank` directions
    energy  every matrix keeps the fewest directions that hold this share of its Σσ², above 0 to 1
    mb      those directions of all matrices are kept which hold the most of Σσ² over all of them in a weights file of
            at most so many megabytes (10⁶ bytes), header included; see `allocate`
    ranks   {matrix: the directions that it keeps}; a matrix that is not named is left out

    Give one of the four. strength: what is kept is multiplied by it (not with DoRA, whose magnitudes do not scale). The
    written file is read back and compared. Raises UserError for a value that is not possible, for what cannot be read
    or written, and where nothing of the adapter would be left.
    """
    folder, out = Path(folder), Path(out)
    _check(rank, energy, mb, ranks)
    if out.resolve() == folder.resolve():
        raise UserError(f"{out} holds what is being cut; name another folder")
    if (out / "config.json").exists() and not (out / CONFIG).exists():
        raise UserError(f"{out} holds a model; name another folder for the adapter")
    plan = Plan(read_adapter(folder))
    return plan.write(out, plan.ranks(rank=rank, energy=energy, mb=mb, ranks=ranks), strength)


def _check(rank: int | None, energy: float | None, mb: float | None, ranks: Mapping[str, int] | None) -> None:
    ways = {"rank": rank, "energy": energy, "mb": mb, "ranks": ranks}
    given = [n for n, v in ways.items() if v is not None]
    if len(given) != 1:
        raise UserError("give one of rank, energy and mb: how much is kept; given "
                        f"{' and '.join(given) or 'none'}")  # fmt: skip
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 0):
        raise UserError(f"rank is {rank!r}; it is how many directions each matrix keeps: 0, 1, 2 …")
    if energy is not None and not 0 < energy <= 1:
        hint = f" (did you mean {energy / 100:g}?)" if 1 < energy <= 100 else ""
        raise UserError(f"energy is {energy:g}; it is a share of Σσ², above 0 and at most 1{hint}")
    if mb is not None and not 0 < mb < math.inf:
        raise UserError(f"mb is {mb:g}; it is the size of the file in megabytes, above 0")


def _enough(sigma: np.ndarray, share: float) -> int:
    """The least k whose first k directions hold this share of Σσ²; 0 for ΔW = 0."""
    e = np.cumsum(np.square(sigma / (sigma[0] or 1.0)))
    return int(np.searchsorted(e, share * e[-1] * (1 - NOTHING)) + 1) if e[-1] else 0


class Plan(CutOpen):
    """How many directions of each matrix of a stored adapter are kept."""

    def ranks(self, *, rank: int | None = None, energy: float | None = None, mb: float | None = None,
              ranks: Mapping[str, int] | None = None) -> dict[str, int]:  # fmt: skip
        """{matrix: directions that are kept} for one of the four ways of `compress`. UserError for what cannot be."""
        _check(rank, energy, mb, ranks)
        if rank is not None:
            ranks = {k: rank for k in self.most}
        if ranks is not None:
            if wrong := next((k for k in ranks if k not in self.most), None):
                raise unknown("matrix", wrong, self.most, f"in {self.stored.folder}")
            found = {k: ranks.get(k, 0) for k in self.most}
            if any(n < self.least for n in found.values()):
                raise UserError(f"{self.stored.folder} is DoRA's, whose magnitudes stand beside at least one direction"
                                " of each matrix; give --rank 1 or more" if self.least else
                                "ranks has a negative number; a matrix keeps 0, 1, 2 … directions")  # fmt: skip
            return self._spread(found)
        if energy is not None:
            return {k: max(self.least, _enough(s, energy)) for k, s in self.sigma.items()}
        assert mb is not None
        return self.fit(mb)

    def fit(self, mb: float) -> dict[str, int]:
        """The ranks that keep the most of Σσ² in a file of so many megabytes."""
        room = math.floor(mb * MB)
        choices: list[list[str]] = []
        gains, costs = [], []
        for b in self.blocks:
            kinds: dict[Any, list[str]] = {}
            for s in b.sites:  # experts of one parameter have one rank
                kinds.setdefault(s.layout if b.experts else s.key, []).append(s.key)
            for keys in kinds.values():
                m = max(self.most[k] for k in keys)
                gain = np.zeros(m + 1)
                for k in keys:
                    e = np.cumsum(np.square(self.sigma[k][:m]))
                    gain[1 : len(e) + 1] += e
                    gain[len(e) + 1 :] += e[-1]
                each = 4 * (b.experts or 1) * (b.full + b.in_) * (1 + len(b.also))
                cost = np.arange(m + 1) * each + (np.arange(m + 1) > 0) * self._first(b, m, room)
                choices.append(keys)
                gains.append(gain[self.least :])
                costs.append(cost[self.least :])
        least = self.size({k: self.least for k in self.most})
        if least > room:
            raise UserError(f"mb is {mb:g}, but what is not cut alone takes {least / MB:.3g} MB; give at least that")
        if self.size(self.most) <= room:
            return self.most
        rest = least - sum(float(c[0]) for c in costs)
        found = allocate(gains, costs, room - rest - 8) or [0] * len(gains)  # 8: the header's padding
        ranks = self._spread({k: n + self.least for keys, n in zip(choices, found) for k in keys})
        ranks = self._top_up(ranks, choices, gains, costs, room)
        if not any(ranks.values()):
            smallest = min(self.size(self._spread({k: int(k in keys) for k in self.most})) for keys in choices)
            if not self.stored.copies and any(self.most.values()):
                raise UserError(f"mb is {mb:g}, but a single direction of one matrix takes {smallest / MB:.3g} MB;"
                                " give at least that")  # fmt: skip
        return ranks

    def _first(self, b: Block, rank: int, room: int) -> int:
        """At most what a block's first direction takes besides its numbers: entries in the header, and the base's own
        weight that PEFT puts beside an embedding."""
        shapes, data = b.shapes(rank, 1), 0
        for n, t in self.raw.items():
            path, _, param = n.removeprefix(PREFIX).rpartition(".")
            path = path.removesuffix(".base_layer")
            if path in (b.path, *b.also) and f"{path}.{param}" in self.parts.base:
                shapes[n], data = tuple(t["shape"]), data + len(t["data"])
        return entries_length(shapes, room) + data

    def _top_up(self, ranks: dict[str, int], choices: list[list[str]], gains: list[np.ndarray],
                costs: list[np.ndarray], room: int) -> dict[str, int]:  # fmt: skip
        """What the estimate of the header's length may have left over."""
        steps = []
        for keys, gain, cost in zip(choices, gains, costs):
            at = ranks[keys[0]] - self.least
            if at + 1 < len(gain) and gain[at + 1] > gain[at]:
                steps.append((gain[at + 1] - gain[at], cost[at + 1] - cost[at], keys))
        spare = room - self.size(ranks)
        for _, cost, keys in sorted(steps, key=lambda s: -s[0]):
            if cost > spare + 64:  # it is off by a few digits of the header at most
                continue
            more = self._spread({**ranks, **{k: ranks[k] + 1 for k in keys}})
            left = room - self.size(more)
            if left >= 0:
                ranks, spare = more, left
        return ranks

    def _spread(self, ranks: dict[str, int]) -> dict[str, int]:
        """No matrix above its own number of directions, and twins alike."""
        ranks = ranks | {t: ranks[k] for t, k in self.twins.items()}
        return {k: min(ranks[k], n) for k, n in self.most.items()}
