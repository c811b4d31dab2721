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
trace. Its factors live in `module.lora`, out of reach of state_dict: the base model's file stays the base model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core.sites import Rows


class Switch:
    """What all factors of one adapter share: whether they act, and on which rows of the batch (None: on all)."""

    def __init__(self) -> None:
        self.on = True
        self.merged = False
        self.batch = 0
        self.rows: Tensor | slice | None = None


class Factors(nn.Module):
    """A (r, in) and B (out, r) of one site, with the scaling s. B·A is added to `rows` of the module's output.

    A start other than B = 0 has an anchor, its first A0 and B0, and adds s·(B·A − B0·A0): still nothing at first, and
    W0 stays as it is. (PiSSA and LoRA-GA subtract s·B0·A0 from the frozen weight instead, which is the same function.)
    """

    A0: Tensor | None
    B0: Tensor | None

    def __init__(self, A: Tensor, B: Tensor, scaling: float, rows: Rows, switch: Switch, dropout: float = 0.0) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.scaling, self.switch, self.dropout = scaling, switch, dropout
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
        """As `attach` made it: B zero and no anchor."""
        return self.A0 is None and not bool(self.B.any())

    def factored(self) -> tuple[Tensor, Tensor]:
        """(B (out, n), A (n, in)) with ΔW = s·B·A; n = r, or 2r with an anchor."""
        B, A = self.B.detach(), self.A.detach()
        if self.A0 is None or self.B0 is None:
            return B, A
        return torch.cat([B, -self.B0], dim=1), torch.cat([A, self.A0], dim=0)

    @property
    def rows(self) -> Rows:
        return self.slice if self.sliced else cast(Tensor | None, self.index)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """ΔW = s·B·A (out, in) of this site."""
        B, A = self.factored()
        return self.scaling * (B.to(dtype) @ A.to(dtype))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y + s·B·(A·x) on this site's rows; x (…, in), y (…, out of the whole module). The plain version."""
        pick, shape = self.switch.rows, y.shape
        if pick is not None:  # only some rows of the batch: compute and add nothing for the others
            x, y = _batch(x, self.switch.batch)[pick], _batch(y, self.switch.batch)
        x = self.drop(x)
        d = F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))
        if self.A0 is not None and self.B0 is not None:
            d = d - F.linear(F.linear(x, self.A0.to(x.dtype)), self.B0.to(x.dtype))
        d = self.scaling * d
        d = d.to(y.dtype)
        if pick is None:
            return _add_rows(y, d, self.rows)
        full = torch.zeros_like(y)
        full[pick] = _add_rows(full[pick], d, self.rows)
        return (y + full).reshape(shape)


def _batch(x: Tensor, n: int) -> Tensor:
    """x with the batch as its first axis, also where a model has flattened (batch, time) into one."""
    if x.shape[0] % n:
        raise ValueError(
            f"rows() was given {n} adapters, one for each row, but a matrix is called with {x.shape[0]} rows:"
            " the batch has another size, or the model computes something for all rows together"
        )
    return x if x.shape[0] == n else x.reshape(n, -1, x.shape[-1])


def _add_rows(y: Tensor, d: Tensor, rows: Rows) -> Tensor:
    if rows is None:
        return y + d
    if isinstance(rows, slice):
        y = y.clone()  # a block may hold on to y
        y[..., rows] += d
        return y
    return y.index_add(-1, rows, d)


class Fused(torch.autograd.Function):
    """h = W0·x + bias + s·B·(A·x) for a frozen W0, with its backward written by hand.

    It keeps x and u = A·x and nothing else, adds into W0·x in place, and never forms a gradient of W0. With g = ∂L/∂h:
    ∂L/∂B = s·gᵀu,  ∂L/∂A = s·(g·B)ᵀx,  ∂L/∂x = g·W0 + s·(g·B)·A.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W0: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
        A16, B16 = A.to(x.dtype), B.to(x.dtype)
        y = F.linear(x, W0, bias)
        u = F.linear(x.reshape(-1, x.shape[-1]), A16)
        y.view(-1, y.shape[-1]).addmm_(u, B16.T, alpha=s)
        ctx.save_for_backward(x, u, W0, A16, B16)
        ctx.s, ctx.dtypes = s, (A.dtype, B.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, u, W0, A, B = ctx.saved_tensors
        g = grads[0].reshape(-1, W0.shape[0])
        x2 = x.reshape(-1, x.shape[-1])
        gB = torch.mm(g, B).mul_(ctx.s)  # (tokens, r)
        dB = torch.mm(g.T, u).mul_(ctx.s) if ctx.needs_input_grad[4] else None
        dA = torch.mm(gB.T, x2) if ctx.needs_input_grad[3] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(g, W0).addmm_(gB, A).view(x.shape)
        return (dx, None, None, dA if dA is None else dA.to(ctx.dtypes[0]), dB if dB is None else dB.to(ctx.dtypes[1]),
                None)  # fmt: skip


class Store(nn.ModuleDict):
    """The factors of a module, by adapter and target. They stay out of the model's state_dict, both ways."""

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        return {} if destination is None else destination

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        return None


for _name in ("state_dict", "_load_from_state_dict"):
    setattr(Factors, _name, getattr(Store, _name))


class Adapted:
    """Mixed in before a module's own class: its forward, plus the update of every adapter that acts."""

    lora: Store
    W0: Tensor | None  # the very bits of the weight, kept while an adapter is merged

    def active(self) -> Iterator[Factors]:
        for f in self.lora.values():
            f = cast(Factors, f)
            if f.switch.on and not f.switch.merged:
                yield f

    def forward(self, x: Tensor) -> Tensor:
        acting = list(self.active())
        if len(acting) == 1 and self._can_fuse(acting[0], x):
            f = acting[0]
            me = cast(nn.Linear, self)
            return cast(Tensor, Fused.apply(x, me.weight, me.bias, f.A, f.B, f.scaling))
        y = cast(Callable[[Tensor], Tensor], super().forward)(x)  # pyright: ignore[reportAttributeAccessIssue]
        for f in acting:
            y = f.add_to(y, x)
        return y

    def _can_fuse(self, f: Factors, x: Tensor) -> bool:
        me = cast(nn.Linear, self)
        return (
            type(self).__bases__[1] is nn.Linear
            and f.rows is None
            and f.A0 is None
            and f.switch.rows is None
            and not (f.dropout and f.training)
            and not me.weight.requires_grad
            and x.dtype == me.weight.dtype
            and not torch.is_autocast_enabled(x.device.type)
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
        module.W0 = None  # pyright: ignore
    return module


def restore(module: nn.Module) -> None:
    """Inverse of `adapt`."""
    if isinstance(module, Adapted):
        del module.lora, module.W0  # pyright: ignore
        module.__class__ = type(module).__bases__[1]
