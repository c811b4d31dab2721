"""What an adapter may add to a module beside its matrices: the part that bottlenecks and prefixes share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lora_core.layers import Part, Switch, by_row

if TYPE_CHECKING:
    from lora_core.spec import LoraSpec

Shapes = dict[str, dict[str, tuple[int, ...]]]  # {path of the host: {name: shape}}


class Added(Part):
    """New parameters on one host, which act around its forward or after it. They change none of its own, so that
    nothing of them can be merged into the weights."""

    kind: ClassVar[str]

    def __init__(self, switch: Switch, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.switch = switch
        for name, value in tensors.items():
            self.register_parameter(name, nn.Parameter(value))

    @property
    def params(self) -> tuple[str, ...]:
        return ()

    @staticmethod
    def shapes(model: nn.Module, spec: LoraSpec) -> Shapes:
        """Where the spec puts such parts, and how large they are. UserError for a model that cannot have them."""
        raise NotImplementedError

    @staticmethod
    def fresh(model: nn.Module, spec: LoraSpec, shapes: Shapes, generator: torch.Generator) -> dict[str, Any]:
        """{path: {name: its value at the start}}."""
        raise NotImplementedError

    @staticmethod
    def changes(name: str) -> bool:
        """Whether the model computes otherwise when this tensor is not zero, whatever the others are."""
        raise NotImplementedError

    def around(self, host: nn.Module) -> AbstractContextManager[None]:
        """What the host's forward is called in."""
        return nullcontext()

    def after(self, y: Tensor, host: nn.Module) -> Tensor:
        """The host's output y, changed."""
        return y

    def plus(self, y: Tensor, update: Callable[[Tensor], Tensor]) -> Tensor:
        """y + update(y) on the rows of the batch that are this adapter's."""
        pick = self.switch.rows
        if pick is None:
            return y + update(y)
        whole = by_row(y, self.switch.batch)
        full = torch.zeros_like(whole)
        full[pick] = update(whole[pick])
        return (whole + full).reshape(y.shape)
