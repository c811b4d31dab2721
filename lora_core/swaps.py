"""What stands in for a module's parameters while an adapter acts: trained copies, and the experts' sums with ΔW."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_core.layers import Factors, Part, Switch, by_row
from lora_core.sites import Site


class Copies(Part):
    """Parameters that are trained themselves: norms, biases, a classifier's head. They begin as the module's own."""

    def __init__(self, switch: Switch) -> None:
        super().__init__()
        self.switch = switch
        self.of = nn.ParameterDict()

    @property
    def params(self) -> tuple[str, ...]:
        return tuple(self.of)

    def values(self, host: nn.Module) -> dict[str, Tensor]:
        """{parameter of the host: what stands in for it}."""
        return {n: p.to(getattr(host, n).dtype) for n, p in self.of.items()}

    def change(self, host: nn.Module, kept: Callable[[str], Tensor]) -> dict[str, Tensor]:
        return {n: p.detach().to(kept(n).dtype) - kept(n) for n, p in self.of.items()}


class Experts(Part):
    """Factors of the experts of a mixture, whose matrices are one parameter (experts, out, in) and no modules.

    The sum with ΔW is formed at every call, since the experts' own code multiplies by it; so is its gradient, for one
    layer at a time.
    """

    def __init__(self, switch: Switch, param: str) -> None:
        super().__init__()
        self.switch, self.param = switch, param
        self.parts = nn.ModuleList()
        self.where: list[Site] = []

    @property
    def params(self) -> tuple[str, ...]:
        return (self.param,)

    def add(self, f: Factors, site: Site) -> None:
        self.parts.append(f)
        self.where.append(site)

    def delta(self, like: Tensor) -> Tensor:
        """ΔW of all experts, as the parameter is stored; with gradient."""
        first = self.where[0]
        shape = (first.out, first.in_)
        zero = like.new_zeros(shape)
        given: dict[str, list[Tensor]] = {}
        for f, site in zip(self.parts, self.where, strict=True):
            blocks = given.setdefault(site.target, [zero] * like.shape[0])
            blocks[cast(int, site.expert)] = cast(Factors, f).product().to(like.dtype)
        stacked = {t: torch.stack(blocks) for t, blocks in given.items()}
        if first.layout is None:
            whole = stacked[first.target]
        else:
            gate, up = (stacked[t] if t in stacked else zero.expand(like.shape[0], *shape) for t in ("gate", "up"))
            whole = torch.cat([gate, up], 1) if first.layout.name == "halves" else torch.stack([gate, up], 2).flatten(
                1, 2)  # fmt: skip
        return whole.transpose(1, 2) if first.transposed else whole

    def values(self, host: nn.Module) -> dict[str, Tensor]:
        W = cast(Tensor, host._parameters[self.param])
        return {self.param: W + self.delta(W)}

    def change(self, host: nn.Module, kept: Callable[[str], Tensor]) -> dict[str, Tensor]:
        return {self.param: self.delta(kept(self.param)).detach()}


@contextmanager
def standing_in(host: nn.Module, parts: Iterable[Copies | Experts]) -> Iterator[None]:
    """Within the block the host's parameters are what the parts say; several changes of one parameter add up."""
    given: dict[str, list[Tensor]] = {}
    for p in parts:
        for name, value in p.values(host).items():
            given.setdefault(name, []).append(value)
    for name, (first, *more) in given.items():
        own = cast(Tensor, host._parameters[name])
        host.__dict__[name] = first + sum(v - own for v in more) if more else first  # found before _parameters
    try:
        yield
    finally:
        for name in given:
            del host.__dict__[name]


def for_rows(
    parts: Sequence[Copies | Experts], host: nn.Module, own: Callable[..., Any], args: tuple[Any, ...], y: Tensor
) -> Tensor:
    """y with the rows of the batch that are these parts' (of one adapter) computed with them."""
    pick, n = parts[0].switch.rows, parts[0].switch.batch
    assert pick is not None
    flat = args[0].shape[0] != n  # a model may have flattened (batch, time) into one

    def some(a: Any) -> Any:
        return (by_row(a, n)[pick].flatten(0, 1) if flat else by_row(a, n)[pick]) if isinstance(a, Tensor) else a

    with standing_in(host, parts):
        mine = own(*(some(a) for a in args))
    whole = by_row(y, n).clone()
    whole[pick] = mine.reshape(-1, *whole.shape[1:])
    return whole.reshape(y.shape)
