"""The class that a module is given while it is adapted: its own forward, with every adapter that acts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core.layers import Factors, Fused, Part, Together, few, fused, mask_of
from lora_core.methods.part import Added
from lora_core.swaps import Copies, Experts, for_rows, standing_in


class Store(nn.ModuleDict):
    """The parts on a module, by adapter and target; like them out of the model's state_dict."""

    state_dict = Part.state_dict
    _load_from_state_dict = Part._load_from_state_dict


class Adapted:
    """Mixed in before a module's own class: its forward, with every adapter that acts."""

    lora: Store

    def active(self) -> Iterator[Part]:
        for p in self.lora.values():
            p = cast(Part, p)
            if p.switch.on and not p.switch.merged:
                yield p

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        acting = list(self.active())
        if acting and self._can_fuse(acting, args):
            me, x = cast(nn.Linear, self), cast(Tensor, args[0])
            tokens, cuts, factors = x.numel() // x.shape[-1], [], []
            for f in cast(list[Factors], acting):
                A, B = f.pair()
                factors += (B.T, A.T) if f.lookup else (A, B)  # lookup: the head of a tied model
                rows, each = f.switch.rows, tokens // max(1, f.switch.batch)
                some = isinstance(rows, slice)
                cuts.append((rows.start * each, rows.stop * each, f.scaling) if some else (0, tokens, f.scaling))
            if x.is_cuda and len(cuts) > 1 and torch.is_grad_enabled():
                mask = mask_of(cast(list[Factors], acting), [A.shape[0] for A in factors[::2]], x.device)
                return Together.apply(x, me.weight, me.bias, mask, *factors)
            if not torch.is_grad_enabled():
                product = self.__dict__.get("product", F.linear)
                return fused(x, me.weight, me.bias, tuple(cuts), factors, product)
            return Fused.apply(x, me.weight, me.bias, tuple(cuts), *factors)
        me, own = cast(nn.Module, self), cast(Callable[..., Any], super().forward)  # pyright: ignore
        swaps = [p for p in acting if isinstance(p, (Copies, Experts))]
        added = [p for p in acting if isinstance(p, Added)]
        with standing_in(me, [p for p in swaps if p.switch.rows is None]), ExitStack() as around:
            for p in added:
                around.enter_context(p.around(me))
            y = base = own(*args, **kwargs)
            for switch in dict.fromkeys(p.switch for p in swaps if p.switch.rows is not None):
                y = for_rows([p for p in swaps if p.switch is switch], me, own, args, y)
            for f in acting:
                if isinstance(f, Factors):
                    y = f.add_to(y, args[0], me, base)
            for p in added:
                y = p.after(y, me)
        return y

    def _can_fuse(self, acting: Sequence[Part], args: tuple[Any, ...]) -> bool:
        if type(self).__bases__[1] is not nn.Linear or len(args) != 1:
            return False
        me, x = cast(nn.Linear, self), args[0]
        if me.weight.requires_grad or x.dtype != me.weight.dtype or torch.is_autocast_enabled(x.device.type):
            return False
        return all(
            isinstance(f, Factors)
            and f.rows is None
            and f.A0 is None
            and f.m is None
            and not (f.dropout and f.training)
            and (f.switch.rows is None or isinstance(f.switch.rows, slice) and x.shape[0] % f.switch.batch == 0)
            for f in acting
        )


_classes: dict[type, type] = {}


def adapt(module: nn.Module) -> nn.Module:
    """Give a module the `Adapted` behaviour (once) and an empty `lora` store; returns the same module."""
    if not isinstance(module, Adapted):
        old = type(module)
        if old not in _classes:
            _classes[old] = type(f"Adapted{old.__name__}", (Adapted, old), {})
        module.__class__ = _classes[old]
        module.lora = Store()
    return module


def restore(module: nn.Module) -> None:
    """Inverse of `adapt`."""
    if isinstance(module, Adapted):
        del module.lora  # pyright: ignore
        module.__class__ = type(module).__bases__[1]


class few_rows:  # noqa: N801
    """Within such a block, linear modules on a CPU multiply by `layers.few`; for decoding, which has one token a row.

    It can be entered again and again: a model that writes for many may be used by others between two tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        self.hosts: list[nn.Module] = []
        for m in model.modules():
            kind = type(m).__bases__[1] if isinstance(m, Adapted) else type(m)
            if kind is nn.Linear and m.weight.device.type == "cpu":
                self.hosts.append(m)
        self.swapped: list[tuple[dict[str, Any], str]] = []

    def __enter__(self) -> None:
        for m in self.hosts:
            own = m.__dict__
            name = "product" if isinstance(m, Adapted) else "forward"
            if name not in own:
                own[name] = few if name == "product" else partial(_plain, m)
                self.swapped.append((own, name))

    def __exit__(self, *_: object) -> None:
        for own, name in self.swapped:
            own.pop(name, None)
        self.swapped.clear()


def _plain(module: Any, x: Tensor) -> Tensor:
    return few(x, module.weight, module.bias)
