"""The arithmetic of LoRA on one matrix (section 4.1, equation 3).

                 in                              W0   frozen, (out, in)
           ┌────────────┐  A  (r, in)            A    Gaussian at the start, trained
           └────────────┘                        B    zero at the start, trained
     ┌─┐   ┌────────────┐
     │ │   │            │                        h = W0·x + s·B·(A·x),   s = α/r or α/√r
 out │B│   │     W0     │
     │ │   │            │                        B·(A·x) costs r·(in + out) products for a token, W0·x costs
     └─┘   └────────────┘                        in·out; ΔW = s·B·A itself is never formed while training.
      r                                          B = 0 makes ΔW = 0: the model starts as the base model.

A module is adapted by giving it a class of its own that derives from its old one (`Adapted` before `nn.Linear`,
`Conv1D`, …): its weight, its name and its state_dict stay what they were, and taking the class away again leaves no
trace. What an adapter has on it lives in `module.lora`, out of reach of state_dict: the base model's file stays the
base model's. There are three kinds: Factors add to a module's output; Copies and Experts stand in for its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core.sites import Rows, Site, plain_weight


class Switch:
    """What all parts of one adapter share: whether they act, and on which rows of the batch (None: on all)."""

    def __init__(self) -> None:
        self.on = True
        self.merged = False
        self.batch = 0
        self.rows: Tensor | slice | None = None


class Part(nn.Module):
    """What one adapter has on one module. Parts stay out of the model's state_dict, both ways."""

    switch: Switch

    @property
    def params(self) -> tuple[str, ...]:
        """The host's parameters that this part changes."""
        return ("weight",)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        return {} if destination is None else destination

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        return None

    def change(self, host: nn.Module, kept: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """{parameter of the host: what merging adds to it}, as it is stored, in the dtype of kept(name), its W0."""
        raise NotImplementedError


class Factors(Part):
    """A (r, in) and B (out, r) of one site, with the scaling s. B·A is added to `rows` of the module's output.

    A start other than B = 0 has an anchor, its first A0 and B0, and adds s·(B·A − B0·A0): still nothing at first, and
    W0 stays as it is. (PiSSA and LoRA-GA subtract s·B0·A0 from the frozen weight instead, which is the same function.)

    m (out,)  DoRA's magnitudes: W' = c·(W0 + s·B·A) with c = m/‖W0 + s·B·A‖ row by row, the norm without gradient
    g (r,)    gates of the directions, of which training may turn some to zero: B·diag(g)·A
    An embedding is looked up: x are ids, and A (r, vocabulary) has a column for each. Where its weight is the head's
    too (tied), the head adds the transposed product.
    """

    A0: Tensor | None
    B0: Tensor | None

    def __init__(self, A: Tensor, B: Tensor, scaling: float, rows: Rows, switch: Switch, dropout: float = 0.0, *,
                 lookup: bool = False, transposed: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.m: nn.Parameter | None = None
        self.g: nn.Parameter | None = None
        self.scaling, self.switch, self.dropout = scaling, switch, dropout
        self.lookup, self.transposed = lookup, transposed
        self.sliced = isinstance(rows, slice)
        self.slice = rows if isinstance(rows, slice) else slice(None)
        self.register_buffer("index", rows if isinstance(rows, Tensor) else None, persistent=False)
        self.register_buffer("A0", None, persistent=False)
        self.register_buffer("B0", None, persistent=False)

    @torch.no_grad()
    def anchor(self, A0: Tensor, B0: Tensor) -> None:
        """Start from these factors, so that the update is measured from them."""
        self.A.copy_(A0)
        self.B.copy_(B0)
        self.A0, self.B0 = self.A.detach().clone(), self.B.detach().clone()

    @property
    def untouched(self) -> bool:
        """As `attach` made it: no anchor, and B zero (an embedding: A zero)."""
        return self.A0 is None and not bool((self.A if self.lookup else self.B).any())

    @property
    def rows(self) -> Rows:
        return self.slice if self.sliced else cast(Tensor | None, self.index)

    # ---- as matrices
    def pair(self) -> tuple[Tensor, Tensor]:
        """(A, B) with the gates in B."""
        return self.A, self.B if self.g is None else self.B * self.g

    def product(self) -> Tensor:
        """s·B·A (out, in), with gradient; less the anchor's."""
        A, B = self.pair()
        d = self.scaling * (B @ A)
        return d if self.A0 is None or self.B0 is None else d - self.scaling * (self.B0 @ self.A0)

    def factored(self) -> tuple[Tensor, Tensor]:
        """(B (out, n), A (n, in)) of s·B·A; n = r, 2r with an anchor, or less where gates are closed."""
        A, B = (p.detach() for p in self.pair())
        if self.g is not None:
            live = self.g.detach() != 0
            live[0] |= not live.any()  # an update of rank 0 keeps one direction, of nothing
            A, B = A[live], B[:, live]
        if self.A0 is None or self.B0 is None:
            return B, A
        return torch.cat([B, -self.B0], dim=1), torch.cat([A, self.A0], dim=0)

    def dense(self, dtype: torch.dtype = torch.float32, W0: Tensor | None = None) -> Tensor:
        """ΔW (out, in) of this site: s·B·A, and with DoRA W' − W0, for which it needs W0."""
        B, A = self.factored()
        d = self.scaling * (B.to(dtype) @ A.to(dtype))
        if self.m is None:
            return d
        assert W0 is not None
        W = W0.to(dtype)
        return self.stretch(W0).detach().to(dtype)[:, None] * (W + d) - W

    def change(self, host: nn.Module, kept: Callable[[str], Tensor]) -> dict[str, Tensor]:
        W = kept("weight")
        view = W.T if self.transposed else W
        rows = slice(None) if self.rows is None else self.rows
        change = torch.zeros_like(view)
        change[rows] = self.dense(W.dtype, view[rows])
        return {"weight": change.T if self.transposed else change}

    # ---- DoRA
    @torch.no_grad()
    def lengths(self, W0: Tensor) -> Tensor:
        """‖W0 + s·B·A‖ of every row (out,), without forming the sum."""
        W, A, B = W0.to(self.A.dtype), self.A, self.pair()[1]
        cross = (B * (W @ A.T)).sum(1)
        return (W.square().sum(1) + 2 * self.scaling * cross + self.scaling**2 * ((B @ (A @ A.T)) * B).sum(1)).sqrt()

    def stretch(self, W0: Tensor) -> Tensor:
        """c (out,), by which DoRA multiplies every row of W0 + s·B·A."""
        assert self.m is not None
        return self.m / self.lengths(W0).clamp_min(torch.finfo(self.A.dtype).tiny)

    # ---- acting
    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def update(self, x: Tensor, host: nn.Module) -> Tensor:
        """s·B·(A·x) on this site's rows: x (…, in) to (…, out). The plain version."""
        A, B = self.pair()
        pairs = [(A, B, self.scaling)]
        if self.A0 is not None and self.B0 is not None:
            pairs.append((self.A0, self.B0, -self.scaling))
        x = x if isinstance(host, nn.Embedding) else self.drop(x)
        total: Any = 0
        for A, B, s in pairs:
            if isinstance(host, nn.Embedding):
                d = F.linear(F.embedding(x, A.T), B) * getattr(host, "embed_scale", 1.0)  # Gemma's and BART's
            elif self.lookup:  # the head of a tied model: ΔWᵀ
                d = F.linear(F.linear(x, B.T.to(x.dtype)), A.T.to(x.dtype))
            else:
                d = F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))
            total = total + s * d
        return total

    def add_to(self, y: Tensor, x: Tensor, host: nn.Module, own: Tensor) -> Tensor:
        """y + ΔW·x on this site's rows; x (…, in), y (…, out of the whole module), own: W0·x + bias."""
        pick, shape = self.switch.rows, y.shape
        if pick is not None:  # only some rows of the batch: compute and add nothing for the others
            x, own, y = _by_row(x, self.switch.batch)[pick], _by_row(own, self.switch.batch)[pick], _by_row(
                y, self.switch.batch)  # fmt: skip
        d = self.update(x, host)
        if self.m is not None:
            rows = slice(None) if self.rows is None else self.rows
            W = plain_weight(host, "weight")
            c = self.stretch((W.T if self.transposed else W)[rows])
            bias = getattr(host, "bias", None)
            d = c * d + (c - 1) * (own[..., rows] if bias is None else own[..., rows] - bias[rows])
        d = d.to(y.dtype)
        if pick is None:
            return _add_rows(y, d, self.rows)
        full = torch.zeros_like(y)
        full[pick] = _add_rows(full[pick], d, self.rows)
        return (y + full).reshape(shape)


def _by_row(x: Tensor, n: int) -> Tensor:
    """x with the batch as its first axis, also where a model has flattened (batch, time) into one."""
    if x.shape[0] % n:
        raise ValueError(
            f"rows() was given {n} adapters, one for each row, but a matrix is called with {x.shape[0]} rows:"
            " the batch has another size, or the model computes something for all rows together"
        )
    return x if x.shape[0] == n else x.reshape(n, -1, *x.shape[1:])


def _add_rows(y: Tensor, d: Tensor, rows: Rows) -> Tensor:
    if rows is None:
        return y + d
    if isinstance(rows, slice):
        y = y.clone()  # a block may hold on to y
        y[..., rows] += d
        return y
    return y.index_add(-1, rows, d)


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


class Fused(torch.autograd.Function):
    """h = W0·x + bias + s·B·(A·x) for a frozen W0, with its backward written by hand.

    It keeps x and u = A·x and nothing else, adds into W0·x in place, and never forms a gradient of W0. With g = ∂L/∂h:
    ∂L/∂B = s·gᵀu,  ∂L/∂A = s·(g·B)ᵀx,  ∂L/∂x = g·W0 + s·(g·B)·A.
    Several pairs of factors may each have some tokens of the batch: cuts are (first token, last + 1, s) of each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W0: Tensor, bias: Tensor | None, cuts: Sequence[tuple[int, int, float]],
                *factors: Tensor) -> Tensor:  # fmt: skip
        narrow = [f.to(x.dtype) for f in factors]  # A1, B1, A2, B2, …
        y = F.linear(x, W0, bias)
        x2, y2 = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        us = []
        for (i, j, s), A, B in zip(cuts, narrow[::2], narrow[1::2], strict=True):
            us.append(F.linear(x2[i:j], A))
            y2[i:j].addmm_(us[-1], B.T, alpha=s)
        ctx.save_for_backward(x, W0, *us, *narrow)
        ctx.cuts, ctx.dtype = cuts, factors[0].dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, W0, *rest = ctx.saved_tensors
        us, factors = rest[: len(ctx.cuts)], rest[len(ctx.cuts) :]
        g, x2 = grads[0].reshape(-1, W0.shape[0]), x.reshape(-1, x.shape[-1])
        need = ctx.needs_input_grad
        dx = torch.mm(g, W0) if need[0] else None
        out: list[Tensor | None] = []
        for n, ((i, j, s), u) in enumerate(zip(ctx.cuts, us, strict=True)):
            A, B = factors[2 * n], factors[2 * n + 1]
            gB = torch.mm(g[i:j], B).mul_(s)  # (tokens, r)
            out.append(torch.mm(gB.T, x2[i:j]).to(ctx.dtype) if need[4 + 2 * n] else None)
            out.append(torch.mm(g[i:j].T, u).mul_(s).to(ctx.dtype) if need[5 + 2 * n] else None)
            if dx is not None:
                dx[i:j].addmm_(gB, A)
        return (None if dx is None else dx.view(x.shape), None, None, None, *out)


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
            return Fused.apply(x, me.weight, me.bias, cuts, *factors)
        me, own = cast(nn.Module, self), cast(Callable[..., Any], super().forward)  # pyright: ignore
        swaps = [p for p in acting if isinstance(p, (Copies, Experts))]
        with _standing_in(me, [p for p in swaps if p.switch.rows is None]):
            y = base = own(*args, **kwargs)
            for switch in dict.fromkeys(p.switch for p in swaps if p.switch.rows is not None):
                y = _for_rows([p for p in swaps if p.switch is switch], me, own, args, y)
            for f in acting:
                if isinstance(f, Factors):
                    y = f.add_to(y, args[0], me, base)
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


@contextmanager
def _standing_in(host: nn.Module, parts: Iterable[Copies | Experts]) -> Iterator[None]:
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


def _for_rows(
    parts: Sequence[Copies | Experts], host: nn.Module, own: Callable[..., Any], args: tuple[Any, ...], y: Tensor
) -> Tensor:
    """y with the rows of the batch that are these parts' (of one adapter) computed with them."""
    pick, n = parts[0].switch.rows, parts[0].switch.batch
    assert pick is not None
    flat = args[0].shape[0] != n  # a model may have flattened (batch, time) into one

    def some(a: Any) -> Any:
        return (_by_row(a, n)[pick].flatten(0, 1) if flat else _by_row(a, n)[pick]) if isinstance(a, Tensor) else a

    with _standing_in(host, parts):
        mine = own(*(some(a) for a in args))
    whole = _by_row(y, n).clone()
    whole[pick] = mine.reshape(-1, *whole.shape[1:])
    return whole.reshape(y.shape)


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
