"""Bottlenecks and prefixes of a spec: where they stand, how they begin; names are "path.prefix.K"."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_core.methods.bottleneck import Bottleneck
from lora_core.methods.part import Added
from lora_core.methods.prefix import Prefix
from lora_core.spec import LoraSpec

KINDS: dict[str, type[Added]] = {k.kind: k for k in (Bottleneck, Prefix)}


def added_shapes(model: nn.Module, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
    """{"path.kind.name": shape} of all that a spec adds to a model. UserError where the model cannot have it."""
    return {f"{path}.{kind}.{name}": shape for kind in _kinds(spec)
            for path, of in KINDS[kind].shapes(model, spec).items() for name, shape in of.items()}  # fmt: skip


def fresh_added(model: nn.Module, spec: LoraSpec, seed: int) -> dict[str, Tensor]:
    """The same names with their values at the start."""
    found = {}
    for kind in _kinds(spec):
        shapes = KINDS[kind].shapes(model, spec)
        values = KINDS[kind].fresh(model, spec, shapes, torch.Generator().manual_seed(seed))
        found |= {f"{path}.{kind}.{name}": values[path][name] for path, of in shapes.items() for name in of}
    return found


def by_host(named: Mapping[str, Tensor]) -> dict[tuple[str, str], dict[str, Tensor]]:
    """{(path of the host, kind): {name: value}}."""
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for full, value in named.items():
        path, kind, name = full.rsplit(".", 2)
        found.setdefault((path, kind), {})[name] = value
    return found


def acts(named: Mapping[str, object]) -> bool:
    """Whether the model computes otherwise with these values (arrays or tensors)."""
    return any(KINDS[k].changes(n) and bool((v != 0).any()) for full, v in named.items()  # pyright: ignore
               for _, k, n in [full.rsplit(".", 2)])  # fmt: skip


def _kinds(spec: LoraSpec) -> list[str]:
    return [kind for kind in KINDS if getattr(spec, kind)]
