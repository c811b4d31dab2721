"""A stored adapter as data, before any model: what `files.read_adapter` gives. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora_core.families import Layout
from lora_core.peft_format import Unit, is_saved
from lora_core.spec import LoraSpec


@dataclass(frozen=True, kw_only=True)
class StoredSite(Unit):
    """One matrix of a stored adapter: where it belongs, and ΔW = scaling·B·A with A (r, in) and B (out, r).

    m (out,): DoRA's magnitudes; ΔW is then that of the formula m·(W0 + s·B·A)/‖W0 + s·B·A‖, for which it takes W0.
    """

    key: str
    target: str
    layer: int | None
    layout: Layout | None = None
    also: tuple[str, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether s·B·A is more than zero."""
        return bool(self.A.any() and self.B.any())


@dataclass(frozen=True, kw_only=True)
class Stored:
    """An adapter read from a folder, without its model.

    sites   {key: its factors}
    copies  {"module path.parameter": its trained value}: norms, biases, heads
    base_weights  the model's own, which PEFT has written beside an embedding's factors; named as the copies are
    spec is None for an adapter that this library did not write; info is what was saved beside it.
    """

    folder: Path
    config: dict[str, Any]
    sites: dict[str, StoredSite]
    copies: dict[str, np.ndarray] = field(default_factory=dict)
    base_weights: dict[str, np.ndarray] = field(default_factory=dict)
    spec: LoraSpec | None = None
    info: dict[str, Any] = field(default_factory=dict)
    fresh: bool = False

    @property
    def base(self) -> str | None:
        """The base model as the adapter names it: a registry name, a folder or a hub id."""
        return self.info.get("model") or self.config.get("base_model_name_or_path")

    @property
    def dora(self) -> bool:
        """Whether the matrices have magnitudes."""
        return any(s.m is not None for s in self.sites.values())

    def foreign_spec(self) -> LoraSpec:
        """A LoraSpec that describes a PEFT adapter: every matrix and module by its path, with its own rank and α."""
        c = self.config
        saved: dict[str, bool] = {}  # module: is more than its bias trained?
        for name in self.copies:
            path, _, param = name.rpartition(".")
            saved[path] = saved.get(path, False) or param != "bias" or is_saved(path, c.get("modules_to_save") or [])
        full = tuple(p for p, whole in saved.items() if whole)
        biases = ("bias",) if len(full) < len(saved) else ()
        ranks = {k: s.A.shape[0] for k, s in self.sites.items()}
        return LoraSpec(
            targets=(*self.sites, *biases) or full,
            full=full,
            rank=int(c["r"]),
            alpha=float(c["lora_alpha"]),
            scaling="alpha/sqrt(r)" if c.get("use_rslora") else "alpha/r",
            dora=self.dora,
            dropout=float(c.get("lora_dropout") or 0.0),
            rank_pattern=tuple((k, r) for k, r in ranks.items() if r != c["r"]),
            alpha_pattern=tuple((k, s.alpha) for k, s in self.sites.items() if s.alpha != c["lora_alpha"]),
        )
