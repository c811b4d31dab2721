"""What a model knows of its adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from lora_core.errors import unknown

if TYPE_CHECKING:
    from lora_core.adapter import Adapter
    from lora_core.quantised import Bits


class Registry:
    """What a model knows of its adapters: them by name, which parameters were trainable before the first, and the very
    bits of the parameters that have something merged into them."""

    def __init__(self, model: nn.Module) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        self.kept: dict[nn.Parameter, Tensor | Bits] = {}


def book_of(model: nn.Module) -> Registry:
    """The model's book of adapters; made at the first call."""
    book = model.__dict__.get("lora_adapters")
    if book is None:
        book = Registry(model)
        object.__setattr__(model, "lora_adapters", book)
    return book


def get_adapter(model: nn.Module, name: str) -> Adapter:
    """The attached adapter of that name; UserError with the nearest match where there is none."""
    adapters = book_of(model).adapters
    if name not in adapters:
        raise unknown("adapter", name, adapters, "on this model")
    return adapters[name]
