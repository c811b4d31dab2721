"""A stored adapter cut open, and what is left of it written: the SVD of every matrix, and PEFT's files of some of it.

Slices of a fused module stay blocks of it, experts stay blocks of their parameter, and both users of a tied matrix get
the same factors. What was trained itself is carried over as it lies in the file, bit by bit. No model, no torch.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from lora_core.blocks import SIZES, Block, Shapes, blocks_of, header_of, ordered, twins_of
from lora_core.errors import UserError, is_real
from lora_core.families import DIRECT
from lora_core.files import read_adapter
from lora_core.home import write, writing
from lora_core.peft_format import (
    CONFIG,
    EXPERTS,
    FACTOR,
    LAB,
    NO_TARGET,
    PREFIX,
    WEIGHTS,
    parse,
    read_json,
    read_tensors,
)
from lora_core.stored import Stored, StoredSite

NOTHING = 1e-12  # of the largest singular value: rounding, not a direction


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What `compress` wrote.

    ranks        {matrix: the directions that are kept}; before: {matrix: its rank}
    file_bytes   of adapter_model.safetensors; before_bytes: of the one that was cut
    kept_energy  Σ kept σ² over Σ σ², over all matrices
    difference   ‖written − whole‖_F / ‖whole‖_F over all matrices, from the file read back: √(1 − kept_energy), unless
                 it was scaled as well
    rounding     the largest ‖written − exact cut‖_F / ‖exact cut‖_F of a matrix: what float32 factors cost
    """

    path: str
    ranks: dict[str, int]
    before: dict[str, int]
    file_bytes: int
    before_bytes: int
    kept_energy: float
    difference: float
    rounding: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


class CutOpen:
    """A stored adapter as what can be left of it: its blocks, the SVD of each matrix, and what is carried over.

    sigma  {matrix: its singular values (n,)}; most: {matrix: how many of them are more than rounding}
    Raises UserError for an adapter without low-rank updates.
    """

    def __init__(self, stored: Stored) -> None:
        if not stored.sites:
            raise UserError(f"{stored.folder} has no low-rank updates to cut: all that it changes is trained itself")
        self.stored = stored
        self.source = read_json(stored.folder / LAB) if stored.spec is not None else {}
        named = self.source.get("copies", [])
        file = stored.folder / WEIGHTS
        self.parts = parse(stored.folder, stored.config, read_tensors(file), named)
        self.twins = twins_of(stored)
        self.blocks = blocks_of(stored, self.parts, self.twins)
        self.least = 1 if stored.dora else 0
        self.svd = {s.key: svd_of(s) for b in self.blocks for s in b.sites}
        for twin, key in self.twins.items():
            B, sigma, A = self.svd[key]
            self.svd[twin] = (A.T, sigma, B.T)
        self.svd = {k: self.svd[k] for k in stored.sites}
        self.sigma = {k: s for k, (_, s, _) in self.svd.items()}
        self.most = {k: max(self.least, int((s > NOTHING * s[0]).sum())) for k, s in self.sigma.items()}
        with file.open("rb") as f:
            self.raw: dict[str, dict[str, Any]] = dict(safetensors.deserialize(f.read()))

    def energy(self, ranks: Mapping[str, int]) -> float:
        """Σ kept σ² over Σ σ², over all matrices; 1 for ΔW = 0."""
        kept = sum(float(np.square(s[: ranks[k]]).sum()) for k, s in self.sigma.items())
        total = sum(float(np.square(s).sum()) for s in self.sigma.values())
        return kept / total if total else 1.0

    # ---- the file
    def kept(self, ranks: Mapping[str, int]) -> list[tuple[Block, int, int]]:
        """(block, its rank, its depth in base_layers) of what is not left out."""
        blocks = [b for b in self.blocks if b.rank(ranks)]
        params: dict[str, list[str]] = {}
        for b in blocks:
            if b.experts:
                params.setdefault(b.path, []).append(b.param)
        order = {p: sorted(v, key=lambda n: EXPERTS.index(n) if n in EXPERTS else -1) for p, v in params.items()}
        return [(b, b.rank(ranks), len(order[b.path]) - 1 - order[b.path].index(b.param) if b.experts else 0)
                for b in blocks]  # fmt: skip

    def carried(self, ranks: Mapping[str, int]) -> dict[str, str]:
        """{name in the new file: name in the old one} of what is no factor."""
        there = {p for b, *_ in self.kept(ranks) for p in (b.path, *b.also)}
        out = {}
        for name in self.raw:
            rest = name.removeprefix(PREFIX)
            factor = FACTOR.fullmatch(rest)
            if factor:
                if factor[4] == "magnitude_vector":
                    out[name] = name
                continue
            path, _, param = rest.rpartition(".")
            path, new = path.removesuffix(".base_layer"), name
            if path != rest.rpartition(".")[0] and path not in there:
                if f"{path}.{param}" in self.parts.base:
                    continue  # the base's own weight beside an embedding that is left out
                new = f"{PREFIX}{path}.{param}"
            out[new] = name
        return out

    def _shapes(self, ranks: Mapping[str, int]) -> Shapes:
        found = {n: ("F32", s) for b, r, d in self.kept(ranks) for n, s in b.shapes(r, d).items()}
        more = {n: self.raw[old] for n, old in self.carried(ranks).items()}
        return found | {n: (t["dtype"], tuple(t["shape"])) for n, t in more.items()}

    def size(self, ranks: Mapping[str, int]) -> int:
        """Bytes of the weights file with these ranks."""
        shapes = self._shapes(ranks)
        return len(header_of(shapes)) + sum(SIZES[d] * math.prod(s) for d, s in shapes.values())

    def write(self, out: Path, ranks: Mapping[str, int], strength: float = 1.0) -> Compressed:
        """Write what is left with these ranks, read it back and compare; see `compress`."""
        stored = self.stored
        if self.least and strength != 1:
            raise UserError(f"{stored.folder} is DoRA's, whose magnitudes do not scale; its strength can only be 1")
        if not is_real(strength):
            raise UserError(f"strength is {strength}; it is a finite number, 1 for ΔW as it is")
        if not any(ranks.values()) and not stored.copies:
            raise UserError(f"nothing of {stored.folder} would be left: " + (
                "ΔW is zero in every matrix" if not any(self.most.values()) else
                "with rank 0 it is the base model; keep 1 or more"))  # fmt: skip
        data = self.file(ranks, strength)
        config, lab = self.config(ranks), self.lab(ranks, strength)
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            write(out / WEIGHTS, data)
            write(out / CONFIG, json.dumps(config, indent=2).encode())
            if lab is None:
                (out / LAB).unlink(missing_ok=True)
            else:
                write(out / LAB, json.dumps(lab, indent=1, ensure_ascii=False).encode())
        difference, rounding = self.compare(read_adapter(out), ranks, strength)
        return Compressed(path=str(out), ranks=dict(ranks), before={k: len(s.A) for k, s in stored.sites.items()},
                          file_bytes=len(data), before_bytes=(stored.folder / WEIGHTS).stat().st_size,
                          kept_energy=self.energy(ranks), difference=difference, rounding=rounding)  # fmt: skip

    def file(self, ranks: Mapping[str, int], strength: float = 1.0) -> bytes:
        """The weights file, in safetensors' format."""
        cuts = {k: (B[:, : ranks[k]] * strength, A[: ranks[k]]) for k, (B, _, A) in self.svd.items()}
        tensors = {n: v for b, r, d in self.kept(ranks) for n, v in b.tensors(cuts, r, d).items()}
        shapes, carried = self._shapes(ranks), self.carried(ranks)
        pieces = [np.ascontiguousarray(tensors[n], "<f4").tobytes() if n in tensors else
                  bytes(self.raw[carried[n]]["data"]) for n in ordered(shapes)]  # fmt: skip
        return b"".join([header_of(shapes), *pieces])

    # ---- beside it
    def config(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        """adapter_config.json: as it was, with the new ranks, each scaled by α/r = 1."""
        kept = self.kept(ranks)
        old = self.stored.config
        by_name = {n: r for b, r, _ in kept for n in (b.name, *b.also)}
        r = Counter(by_name.values()).most_common(1)[0][0] if by_name else int(old["r"])
        odd = {f"^{n}": v for n, v in by_name.items() if v != r}
        new = {**old, "r": r, "lora_alpha": r, "use_rslora": False, "rank_pattern": odd, "alpha_pattern": dict(odd),
               "init_lora_weights": True}  # fmt: skip
        if len(kept) < len(self.blocks):
            params = {b.name for b, *_ in kept if b.name != b.path}
            modules = [n for n in by_name if n not in params]
            new["target_modules"] = modules if by_name else NO_TARGET
            new["target_parameters"] = sorted(params) or None
            if old.get("bias") == "lora_only" and any(n.endswith(".bias") for n in self.stored.copies):
                new["bias"] = "all"  # a bias may now stand in a module without factors
        return new

    def lab(self, ranks: Mapping[str, int], strength: float = 1.0) -> dict[str, Any] | None:
        """lora_lab.json, for an adapter that has one."""
        spec = self.stored.spec
        if spec is None:
            return None
        there = {s.key: s for b, *_ in self.kept(ranks) for s in b.sites if ranks[s.key]}
        kept = {k: s for k, s in self.stored.sites.items() if k in there}
        rs = {k: ranks[k] for k in kept}
        r = Counter(rs.values()).most_common(1)[0][0] if rs else spec.rank
        odd = {k: n for k, n in rs.items() if n != r}
        whole = len(kept) in (0, len(self.stored.sites))
        targets = spec.targets if whole else (*kept, *(t for t in spec.targets if t in DIRECT))
        spec = replace(spec, targets=targets, rank=r, alpha=float(r), scaling="alpha/r", init="gaussian", mask=0.0,
                       rank_pattern=odd, alpha_pattern={k: float(n) for k, n in odd.items()})  # fmt: skip
        sites = [{"key": k, "path": s.path, "target": s.target, "layer": s.layer, "rank": rs[k], "scaling": 1.0,
                  "layout": s.layout, "also": s.also, "param": s.param, "expert": s.expert}
                 for k, s in kept.items()]  # fmt: skip
        info = dict(self.stored.info)
        whole_loss = {"whole_loss": info.pop("loss")} if "loss" in info else {}  # it was not measured with the cut
        info |= {"cut_from": str(self.stored.folder.resolve()), **whole_loss}
        info |= {"strength": strength} if strength != 1 else {}
        return {**self.source, "format": 2, "spec": spec.to_dict(), "sites": sites, "info": info, "fresh": False}

    def compare(self, written: Stored, ranks: Mapping[str, int], strength: float = 1.0) -> tuple[float, float]:
        """(difference, rounding) of `Compressed`."""
        apart, rounding = 0.0, 0.0
        for k, s in self.stored.sites.items():
            B, sigma, A = self.svd[k]
            b, a = B[:, : ranks[k]] * strength, A[: ranks[k]]
            n = written.sites.get(k)
            nb, na = (np.float64(n.B) * n.scaling, np.float64(n.A)) if n is not None else (b * 0, a)
            apart += _norm(np.hstack([nb, np.float64(s.B) * -s.scaling]), np.vstack([na, np.float64(s.A)])) ** 2
            size = abs(strength) * float(np.linalg.norm(sigma[: ranks[k]]))
            if size:  # nb·na − b·a, without the difference of two near numbers
                rounding = max(rounding, _norm(np.hstack([nb - b, b]), np.vstack([na, na - a])) / size)
        whole = math.sqrt(sum(float(np.square(s).sum()) for s in self.sigma.values()))
        return (math.sqrt(apart) / whole if whole else 0.0), rounding


def _norm(B: np.ndarray, A: np.ndarray) -> float:
    """‖B·A‖_F through the factors' Gram matrices; exact to about 1e-8 of ‖B‖·‖A‖."""
    return math.sqrt(max(0.0, float(((B.T @ B) * (A @ A.T)).sum())))


def svd_of(s: StoredSite) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(U·√σ (out, n), σ (n,), √σ·Vᵀ (n, in)) of s·B·A in float64, through the factors' QR."""
    qb, rb = _qr(s.B.astype(np.float64))
    qa, ra = _qr(s.A.T.astype(np.float64))
    u, sigma, vh = np.linalg.svd(s.scaling * (rb @ ra.T), full_matrices=False)
    root = np.sqrt(sigma)
    return (qb @ u) * root, sigma, root[:, None] * (vh @ qa.T)


def _qr(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Thin Q (n, r) and R (r, r) by Cholesky, twice, where X's condition allows (as in spectra.py); else Householder's,
    which numpy has some 30 times slower."""
    length = np.linalg.norm(X, axis=0)
    if X.shape[0] >= X.shape[1] and 1e-140 < length.min() and length.max() < 1e140:
        try:
            Q, R = X / length, np.diag(length)
            for _ in range(2):
                L = np.linalg.cholesky(Q.T @ Q)
                inverse = np.linalg.inv(L)
                if np.linalg.norm(inverse) * math.sqrt(len(L)) > 1e6:
                    return np.linalg.qr(X)
                Q, R = Q @ inverse.T, L.T @ R
            return Q, R
        except np.linalg.LinAlgError:
            pass
    return np.linalg.qr(X)
