"""Adapter layers (Houlsby et al., arXiv 1902.00751; AdapterH in the paper's tables).

    h ← h + up·gelu(down·h + b) + b'        down (m, d), up (d, m)

One after attention's output matrix and one after the MLP's, in every layer, before what flows around them is added.
They are new layers, one after the other: what stands behind must wait for them, at every token (section 3). Because of
the gelu no W takes them in. With up = b' = 0 a new one is the identity, to the bit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core.errors import UserError
from lora_core.methods.part import Added, Shapes

if TYPE_CHECKING:
    from lora_core.spec import LoraSpec

BEHIND = ("o", "down")


class Bottleneck(Added):
    """down (m, d) and its bias (m,), up (d, m) and its bias (d,), behind a matrix whose output is d wide."""

    kind = "bottleneck"
    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor

    @staticmethod
    def shapes(model: nn.Module, spec: LoraSpec) -> Shapes:
        from lora_core.sites import find_sites

        found, m = {}, spec.bottleneck
        for s in find_sites(model):
            chosen = spec.layers == "all" or s.layer in spec.layers
            if chosen and s.target in BEHIND and s.expert is None:
                found[s.path] = {"down": (m, s.full), "down_bias": (m,), "up": (s.full, m), "up_bias": (s.full,)}
        if not found:
            raise UserError(f"{type(model).__name__} has no matrices o and down that a bottleneck could stand behind")
        return found

    @staticmethod
    def fresh(model: nn.Module, spec: LoraSpec, shapes: Shapes, generator: torch.Generator) -> dict[str, Any]:
        return {path: {name: torch.randn(shape, generator=generator) / math.sqrt(shape[1]) if name == "down"
                       else torch.zeros(shape) for name, shape in of.items()}
                for path, of in shapes.items()}  # fmt: skip

    @staticmethod
    def changes(name: str) -> bool:
        return name.startswith("up")

    def update(self, h: Tensor) -> Tensor:
        """h (…, d) to what is added to it."""
        down, b, up, c = (p.to(h.dtype) for p in (self.down, self.down_bias, self.up, self.up_bias))
        return F.linear(F.gelu(F.linear(h, down, b)), up, c)

    def after(self, y: Tensor, host: nn.Module) -> Tensor:
        return self.plus(y, self.update)
