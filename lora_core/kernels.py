"""The arithmetic of the fast path, with few passes over memory: each function beside its plain version.

They save only what their backward needs, a quarter less memory than autograd's own steps. A test holds each against
its plain version, values and gradients.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

EVEN = 32  # numbers of rows are multiples of it where every new one is dear
# Bytes of logits at a time; glibc takes memory above 32 MiB from the system anew at every call.
LOGITS, LOGITS_GPU = 30 << 20, 256 << 20


# ---- plain versions, which the tests hold the fast ones against ------------------------------------------------------
def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x/√(mean(x²) + eps)·weight, over the last axis."""
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up."""
    return F.silu(gate) * up


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (tokens, heads, size) with its halves turned by the angles (tokens, size/2)."""
    a, b = x.chunk(2, -1)
    c, s = cos[:, None], sin[:, None]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def plain_loss(h: Tensor, W: Tensor, targets: Tensor) -> Tensor:
    """Σ −log softmax(W·h)[target] over h (n, hidden), W (vocabulary, hidden)."""
    return F.cross_entropy(F.linear(h, W), targets, reduction="sum")


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale·qkᵀ, nothing ahead)·v of q (rows, heads, time, size); k and v may have fewer heads."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    ahead = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return (scale * q @ k.transpose(-1, -2)).masked_fill(ahead, -torch.inf).softmax(-1) @ v


# ---- fast versions ---------------------------------------------------------------------------------------------------
class Norm(torch.autograd.Function):
    """`plain_norm` with a frozen weight. ∂L/∂x = r·(w∘g) − x·r³·⟨w∘g, x⟩/d with r = 1/√(mean(x²) + eps).

    r is at least float32; what is as large as x stays in x's dtype, rounded where transformers rounds it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact).square_()
        r = r.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return torch.empty_like(x).copy_(x * r).mul_(weight) if exact != x.dtype else (x * r).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, r = ctx.saved_tensors
        d = x.shape[-1]
        g = grads[0] * weight
        along = (g * x).sum(-1, keepdim=True, dtype=r.dtype)  # bmm of vectors takes ten times that on some chips
        return g.mul_(r).addcmul_(x, along * r**3 / d, value=-1), None, None


class SwiGLU(torch.autograd.Function):
    """`plain_swiglu`, which keeps its two inputs and computes silu(gate) again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        (g,) = grads
        return torch.ops.aten.silu_backward(g * up, gate), F.silu(gate).mul_(g)


class Rotate(torch.autograd.Function):
    """`plain_rotate` of x (tokens, heads, size) by angles (tokens, size/2); its backward turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return turn(grads[0], cos, sin, -1.0), None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (a, b), (oa, ob) = x.chunk(2, -1), out.chunk(2, -1)
    c, s = cos[:, None], sin[:, None]
    torch.mul(a, c, out=oa)
    oa.addcmul_(b, s, value=-sign)
    torch.mul(b, c, out=ob)
    ob.addcmul_(a, s, value=sign)
    return out


class Attend(torch.autograd.Function):
    """`plain_attention` of q (rows, heads, time, size), k and v (rows, fewer heads, time, size), causal.

    For bfloat16 on a CPU, where torch's own backward is five times slower than the few products that it stands for.
    The scores are computed again there, some rows at a time; heads that share k and v are one longer product.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (rows, heads, time, size), kinds = ctx.saved_tensors[0].shape, ctx.saved_tensors[1].shape[1]
        each = (heads // kinds * time, size)  # all queries of a head of k and v
        ahead = torch.full((time, time), -torch.inf, dtype=grads[0].dtype, device=grads[0].device).triu_(1)
        ahead = ahead.repeat(heads // kinds, 1)
        some = max(1, LOGITS // (grads[0].element_size() * heads * time * time))
        out: list[tuple[Tensor, Tensor, Tensor]] = []
        for q, g, k, v in zip(*(t.split(some) for t in (ctx.saved_tensors[0], grads[0], *ctx.saved_tensors[1:]))):
            q, g = (t.reshape(-1, *each) for t in (q, g))
            k, v = (t.reshape(-1, time, size) for t in (k, v))
            p = torch.baddbmm(ahead, q, k.transpose(1, 2), alpha=ctx.scale).softmax(-1)
            dv = torch.bmm(p.transpose(1, 2), g)
            ds = torch.ops.aten._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, -1, p.dtype).mul_(ctx.scale)
            out.append((torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q), dv))
        dq, dk, dv = (torch.cat([t[i] for t in out]).view(rows, -1, time, size) for i in range(3))
        return dq, dk, dv, None


class Loss(torch.autograd.Function):
    """`plain_loss` with a frozen W, some rows at a time. Its gradient by h is formed at once, so no logits are kept.

    some: negative targets are among them, which count nothing.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, W: Tensor, targets: Tensor, some: bool = False) -> Tensor:
        total = h.new_zeros((), dtype=torch.float64 if h.dtype == torch.float64 else torch.float32)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        rows = max(1, (LOGITS if h.device.type == "cpu" else LOGITS_GPU) // (4 * W.shape[0]))
        counts = (targets >= 0)[:, None] if some else None
        targets = targets.clamp_min(0) if some else targets
        for i in range(0, len(h), rows):
            part, t = h[i : i + rows], targets[i : i + rows, None]
            logits = F.linear(F.pad(part, (0, 0, 0, short_of_even(part))), W)
            p, right = (chances if h.device.type == "cpu" else chances_gpu)(logits, t)
            del logits
            total -= (right if counts is None else right * counts[i : i + rows]).sum()
            if dh is not None:
                p[: len(t)].scatter_add_(1, t, p.new_full(t.shape, -1.0))
                if len(p) == len(t):
                    torch.mm(p.to(W.dtype), W, out=dh[i : i + rows])
                else:
                    dh[i : i + rows] = torch.mm(p.to(W.dtype), W)[: len(t)]
        if dh is not None:
            ctx.save_for_backward(dh if counts is None else dh.mul_(counts))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dh,) = ctx.saved_tensors
        return dh * grads[0], None, None, None


def chances(logits: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """p = softmax(logits) (n, vocabulary), and log p (m, 1) of the tokens t of the first m rows; at least float32."""
    p = F.log_softmax(logits.float() if logits.element_size() < 4 else logits, -1)
    right = p[: len(t)].gather(1, t)
    return p.exp_(), right


def chances_gpu(logits: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The same with two passes fewer over the logits where the softmax widens them itself: log p of the likeliest
    token, which is never small, less how far the logit of t is below its."""
    p = F.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    top, where = logits[: len(t)].max(-1, keepdim=True)
    return p, p[: len(t)].gather(1, where).log_() - (top.to(p.dtype) - logits[: len(t)].gather(1, t))


class Spread(torch.autograd.Function):
    """x[of]: rows of x (n, size) to the places that share them; the gradients of these add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, of: Tensor) -> Tensor:
        ctx.save_for_backward(of)
        ctx.n = x.shape[0]
        return x.index_select(0, of)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (of,) = ctx.saved_tensors
        return torch.ops.aten.embedding_dense_backward(grads[0].contiguous(), of, ctx.n, -1, False), None


class Pick(torch.autograd.Function):
    """x[at] for places that are all different."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(at)
        ctx.shape = x.shape
        return x.index_select(0, at)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (at,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.shape).index_copy_(0, at, grads[0]), None


class Place(torch.autograd.Function):
    """Rows of x (n, size) to the places `at` of (total, size), zero elsewhere: the transpose of `Pick`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor, total: int) -> Tensor:
        ctx.save_for_backward(at)
        return x.new_zeros(total, x.shape[1]).index_copy_(0, at, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (at,) = ctx.saved_tensors
        return grads[0].index_select(0, at), None, None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`plain_attention`, by what is fastest for these."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return cast(Tensor, Attend.apply(q, k, v, scale))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def short_of_even(x: Tensor, n: int | None = None) -> int:
    """How many rows are added to n (those of x) rows like x's, so that products of a few sizes serve all batches.

    oneDNN makes a program for every size of a product in bfloat16, which takes as long as the product, and keeps it.
    """
    dear = x.dtype == torch.bfloat16 and x.device.type == "cpu"
    return -(len(x) if n is None else n) % EVEN if dear else 0
