"""LoraSpec: the frozen description of an adapter, before any model is touched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from lora_core.errors import UserError, is_real, unknown

Scaling = Literal["alpha/r", "alpha/sqrt(r)"]
SCALINGS = ("alpha/r", "alpha/sqrt(r)")
INITS = ("gaussian", "kaiming", "orthogonal", "pissa", "gradient")
MAX_RANK = 65536


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Which matrices get an update ΔW = s·B·A, of what rank, how scaled and how initialised.

    Section 4.1 of the paper: h = W0·x + s·B·A·x with A (rank, in), B (out, rank), B = 0 at the start.

    targets  logical names, or module paths of the model: q k v o gate up down in the layers, embed and head around
             them (LoRA too); norm and bias, whose vectors are trained themselves, as BitFit does (arXiv 2106.10199);
             () where something else is trained
    rank     r of every matrix, unless `rank_pattern` names another
    alpha    α; the scaling s is α/r ("alpha/r", the paper) or α/√r ("alpha/sqrt(r)", rsLoRA, arXiv 2312.03732)
    layers   "all", or the indices of the layers to adapt
    init     "gaussian" (the paper: A ~ N(0, 1/in)), "kaiming" (what loralib does: A ~ U(±1/√in)) or "orthogonal", all
             with B = 0; "pissa" (W0's top directions) or "gradient" (the first gradient's); starts.py has the details
    train_A  False leaves A as it began and trains B alone (LoRA-FA, arXiv 2308.03303)
    dora     W' = m·(W0 + s·B·A)/‖W0 + s·B·A‖ with the norm of each row and m trained (DoRA, arXiv 2402.09353)
    mask     above 0: ΔW = s·B·diag(g)·A with gates g (rank,), which training pulls to exactly 0 with this strength (as
             SoRA, arXiv 2311.11696): the rank is learned, and `rank` is the most it can be
    full     modules (or single parameters) trained in full and saved with the adapter, by path; "head" is a
             classifier's head, "top2" the last two layers, "all" everything
    bottleneck, prefix  units of adapter layers, tokens of a prefix, in every chosen layer (see methods/); 0 for none
    dropout  probability with which an entry of x is dropped on its way through A, while training
    rank_pattern, alpha_pattern  {name: value} that override rank and alpha; a name is a target or a site's key

    Raises UserError (a ValueError) for any value that is not possible.
    """

    targets: tuple[str, ...] = ("q", "v")
    rank: int = 8
    alpha: float = 16.0
    layers: Literal["all"] | tuple[int, ...] = "all"
    scaling: Scaling = "alpha/r"
    init: Literal["gaussian", "kaiming", "orthogonal", "pissa", "gradient"] = "gaussian"
    train_A: bool = True
    dora: bool = False
    mask: float = 0.0
    full: tuple[str, ...] = ()
    bottleneck: int = 0
    prefix: int = 0
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] | tuple[tuple[str, int], ...] = ()
    alpha_pattern: Mapping[str, float] | tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:  # frozen: every field is normalised here, once
            object.__setattr__(self, name, value)

        for name in ("bottleneck", "prefix"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= MAX_RANK:
                raise UserError(f"{name} is {size!r}; it is a whole number, 0 for none")
        put("targets", _names(self.targets, none=bool(self.full or self.bottleneck or self.prefix)))
        put("layers", _layers(self.layers))
        put("rank", _rank("rank", self.rank))
        put("alpha", _alpha("alpha", self.alpha))
        if self.scaling not in SCALINGS:
            raise unknown("scaling", str(self.scaling), SCALINGS)
        if self.init not in INITS:
            raise unknown("init", str(self.init), INITS)
        for name in ("train_A", "dora"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} is {getattr(self, name)!r}; it is True or False")
        if self.dora and self.init in ("pissa", "gradient"):
            raise UserError(f"dora=True begins at W0 itself, and init={self.init!r} elsewhere; leave out one of them")
        put("full", _names(self.full) if self.full else ())
        if not is_real(self.mask, 0):
            raise UserError(f"mask is {self.mask!r}; it is 0 (no gates) or the strength that pulls them to zero")
        put("mask", float(self.mask))
        if not is_real(self.dropout, 0) or self.dropout >= 1:
            raise UserError(f"dropout is {self.dropout!r}; it is a probability from 0 to below 1")
        put("dropout", float(self.dropout))
        for name, check in (("rank_pattern", _rank), ("alpha_pattern", _alpha)):
            value = getattr(self, name)
            pairs = list(value.items()) if isinstance(value, Mapping) else value
            if not isinstance(pairs, Sequence) or any(not isinstance(p, Sequence) or len(p) != 2 for p in pairs):
                raise UserError(f"{name} is {value!r}; it gives names their values, as in {{'q': 4}}")
            put(name, tuple(sorted((str(k), check(f"{name}[{k!r}]", v)) for k, v in pairs)))

    def rank_of(self, *names: str) -> int:
        """The rank for a site, given its names from the most special to the most general (key, path, target)."""
        return next((dict(self.rank_pattern)[n] for n in names if n in dict(self.rank_pattern)), self.rank)

    def alpha_of(self, *names: str) -> float:
        """α for a site; names as in `rank_of`."""
        return next((dict(self.alpha_pattern)[n] for n in names if n in dict(self.alpha_pattern)), self.alpha)

    def scale(self, rank: int | None = None, alpha: float | None = None) -> float:
        """s, the factor before B·A: α/r or α/√r (section 4.1; arXiv 2312.03732)."""
        r, a = rank or self.rank, self.alpha if alpha is None else alpha
        return a / r if self.scaling == "alpha/r" else a / math.sqrt(r)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        d = asdict(self)
        d["targets"], d["full"] = list(self.targets), list(self.full)
        d["layers"] = "all" if self.layers == "all" else list(self.layers)
        d["rank_pattern"], d["alpha_pattern"] = dict(self.rank_pattern), dict(self.alpha_pattern)
        return d

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> LoraSpec:
        """Inverse of `to_dict`; a key that is no field is a UserError."""
        if not isinstance(d, Mapping):
            raise UserError(f"the adapter's settings are {d!r}; they are names with values, as in {{'rank': 8}}")
        known = [f.name for f in fields(cls)]
        for key in d:
            if key not in known:
                raise unknown("setting", str(key), known, "in LoraSpec")
        return cls(**d)


def _names(targets: Iterable[str] | str, none: bool = False) -> tuple[str, ...]:
    if isinstance(targets, Mapping) or not isinstance(targets, Iterable):
        raise UserError(f"targets are names such as q or v; given {targets!r}")
    names = targets.split(",") if isinstance(targets, str) else list(targets)
    if not all(isinstance(n, str) for n in names):
        raise UserError(f"targets are names such as q or v; given {targets!r}")
    names = [n.strip() for n in names if n.strip()]
    if not names and not none:
        raise UserError("no target: name at least one matrix to adapt, for example q,v")
    return tuple(dict.fromkeys(names))


def _layers(layers: Any) -> Literal["all"] | tuple[int, ...]:
    if isinstance(layers, str):
        if layers == "all":
            return "all"
        raise UserError(f"layers are 'all' or a list of layer numbers; given {layers!r}")
    try:
        numbers = [n for n in layers]
    except TypeError:
        raise UserError(f"layers are 'all' or a list of layer numbers; given {layers!r}") from None
    if not numbers:
        raise UserError("no layer: name at least one layer to adapt, or 'all'")
    for n in numbers:
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise UserError(f"layer {n!r} is not a layer number; layers count from 0")
    return tuple(sorted(set(numbers)))


def _rank(what: str, rank: Any) -> int:
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise UserError(f"{what} is {rank!r}; it must be a whole number from 1 up to the smaller side of the matrix")
    return rank


def _alpha(what: str, alpha: Any) -> float:
    if not is_real(alpha, 0) or alpha == 0:
        raise UserError(f"{what} is {alpha!r}; it must be a positive number")
    return float(alpha)
