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
base model's. Factors, here, add to a module's output; what stands in for its parameters is in swaps.py, and the class
itself in adapted.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core.sites import Rows, plain_weight


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

    def sum_into(self, weight: Tensor, W0: Tensor) -> bool:
        """Write W0 + s·B·A into a weight in one go, where it is no more than that; else False, and nothing is done."""
        A, B = self.pair()
        if self.A0 is not None or self.m is not None or self.rows is not None or self.transposed or self.lookup:
            return False
        if not weight.dtype == A.dtype or weight.shape != (B.shape[0], A.shape[1]):
            return False
        torch.addmm(W0, B, A, alpha=self.scaling, out=weight)
        return True

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
            x, own, y = by_row(x, self.switch.batch)[pick], by_row(own, self.switch.batch)[pick], by_row(
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


def by_row(x: Tensor, n: int) -> Tensor:
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


FEW = 8  # rows; the time of `few` grows from there on, that of F.linear no longer


def few(x: Tensor, W0: Tensor, bias: Tensor | None = None) -> Tensor:
    """W0·x + bias for up to `FEW` rows as (W0·xᵀ)ᵀ, which takes the time of reading W0 once: on a CPU F.linear takes
    twice that for two rows. More rows go through F.linear."""
    if x.numel() > FEW * x.shape[-1]:
        return F.linear(x, W0, bias)
    y = torch.mm(W0, x.reshape(-1, x.shape[-1]).T).T
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], -1)


Cuts = tuple[tuple[int, int, float], ...]  # first token, last + 1, s of each pair of factors


def fused(x: Tensor, W0: Tensor, bias: Tensor | None, cuts: Cuts, factors: Sequence[Tensor],
          product: Callable[..., Tensor] = F.linear) -> Tensor:  # fmt: skip
    """W0·x + bias + s·B·(A·x) for factors A1, B1, A2, B2, …, added in place; for use without gradients."""
    y = product(x, W0, bias)
    x2, y2 = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    for (i, j, s), A, B in zip(cuts, factors[::2], factors[1::2], strict=True):
        if product is few and j - i <= FEW:  # so small that even two dtypes cost less than bfloat16's way of starting
            d = torch.mm(B, torch.mm(A, x2[i:j].T.to(A.dtype)))
            y2[i:j].add_(d.T, alpha=s)
        else:
            y2[i:j].addmm_(F.linear(x2[i:j], A.to(x.dtype)), B.T.to(x.dtype), alpha=s)
    return y


class Fused(torch.autograd.Function):
    """h = W0·x + bias + s·B·(A·x) for a frozen W0, with its backward written by hand.

    It keeps x and u = A·x and nothing else, adds into W0·x in place, and never forms a gradient of W0. With g = ∂L/∂h:
    ∂L/∂B = s·gᵀu,  ∂L/∂A = s·(g·B)ᵀx,  ∂L/∂x = g·W0 + s·(g·B)·A.
    Several pairs of factors may each have some tokens of the batch, by their cuts.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W0: Tensor, bias: Tensor | None, cuts: Cuts, *factors: Tensor) -> Tensor:
        narrow = [f.to(x.dtype) for f in factors]
        y, us = F.linear(x, W0, bias), []
        x2, y2 = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
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


class Together(torch.autograd.Function):
    """`Fused` for several pairs of factors in a few products, whatever their number: for a GPU, where each costs the
    time of a launch and a larger one hardly more. All factors multiply all tokens, and `mask` keeps what is asked for.

    mask (rows, 1, Σr), float32: s of a pair at its own rows and directions, else 0. With all A under one another (Σr,
    in) and all B side by side (out, Σr): h = W0·x + bias + B·(mask∘(A·x)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W0: Tensor, bias: Tensor | None, mask: Tensor, *factors: Tensor) -> Tensor:
        A, B = torch.cat(factors[::2]).to(x.dtype), torch.cat(factors[1::2], 1).to(x.dtype)
        y, x2 = F.linear(x, W0, bias), x.reshape(-1, x.shape[-1])
        u = _masked(F.linear(x2, A), mask)
        y.view(-1, y.shape[-1]).addmm_(u, B.T)
        ctx.save_for_backward(x, W0, mask, u, A, B)
        ctx.dtype, ctx.ranks = factors[0].dtype, [f.shape[0] for f in factors[::2]]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, W0, mask, u, A, B = ctx.saved_tensors
        g, x2 = grads[0].reshape(-1, W0.shape[0]), x.reshape(-1, x.shape[-1])
        gB = _masked(torch.mm(g, B), mask)  # (tokens, Σr)
        dA, dB = torch.mm(gB.T, x2).to(ctx.dtype), torch.mm(g.T, u).to(ctx.dtype)
        pairs = zip(dA.split(ctx.ranks), dB.split(ctx.ranks, 1), strict=True)
        dx = torch.mm(g, W0).addmm_(gB, A).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, *(d for pair in pairs for d in pair)


def _masked(u: Tensor, mask: Tensor) -> Tensor:
    """u (tokens, Σr) times the mask of its rows, in place."""
    return u.view(mask.shape[0], -1, u.shape[1]).mul_(mask).view(u.shape)


def mask_of(acting: Sequence[Factors], ranks: Sequence[int], device: torch.device) -> Tensor:
    """What `Together` needs to know of these factors and which rows they have. It is kept with the first of them, for
    recordings that read it."""
    rows = max(f.switch.batch for f in acting) if any(f.switch.rows is not None for f in acting) else 1
    said = tuple((r.start, r.stop) if isinstance(r := f.switch.rows, slice) else (0, rows) for f in acting)
    key = (rows, said, tuple(ranks), tuple(f.scaling for f in acting), str(device))
    kept = acting[0].__dict__.setdefault("masks", {})
    if key not in kept:
        mask, at = torch.zeros(rows, 1, sum(ranks)), 0
        for f, (i, j), r in zip(acting, said, ranks, strict=True):
            mask[i:j, :, at : at + r] = f.scaling
            at += r
        kept[key] = mask.to(device)
    return kept[key]
