"""The fast path of training: a LLaMA-like body and its loss with few passes over memory, and their plain versions.

On a CPU four fifths of a training step are the frozen weights' products. What saves most is to multiply less: a token
whose whole past is that of another one has the same hidden state, so rows that begin alike are computed once as far as
they do (`Tree`), and nothing is computed behind the last position that is asked for. Most of the rest of a step is
reading and writing activations. The functions here save only what their backward needs: a quarter less memory. The
model's own modules still hold and multiply by every matrix, so adapters act as everywhere.

`body` gives the whole body for models that it knows and that a probe shows to compute the same; what differs from
that (other families, hooks, gradient checkpointing, dropout in attention) is left to transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core.adapted import Adapted
from lora_core.registry import book_of

FAMILIES = ("llama", "mistral", "qwen2")
# How far the probe's hidden states may be from transformers', relative: rounding, which is in other places.
CLOSE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 3e-2}
EVEN = 32  # numbers of rows are multiples of it where every new one is dear
LOGITS = 30 << 20  # bytes of logits at a time; glibc takes memory above 32 MiB from the system anew at every call


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
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, -1.0), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
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
    """`plain_loss` with a frozen W, some rows at a time. Its gradient by h is formed at once, so no logits are kept."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, W: Tensor, targets: Tensor) -> Tensor:
        total = h.new_zeros((), dtype=torch.float64 if h.dtype == torch.float64 else torch.float32)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        rows = max(1, LOGITS // (4 * W.shape[0]))
        for i in range(0, len(h), rows):
            part, t = h[i : i + rows], targets[i : i + rows, None]
            logits = F.linear(F.pad(part, (0, 0, 0, short_of_even(part))), W)
            logp = F.log_softmax(logits.float() if logits.element_size() < 4 else logits, -1)
            del logits
            total -= logp[: len(t)].gather(1, t).sum()
            if dh is not None:
                p = logp.exp_()
                p[: len(t)].scatter_add_(1, t, p.new_full(t.shape, -1.0))
                if len(p) == len(t):
                    torch.mm(p.to(W.dtype), W, out=dh[i : i + rows])
                else:
                    dh[i : i + rows] = torch.mm(p.to(W.dtype), W)[: len(t)]
        if dh is not None:
            ctx.save_for_backward(dh)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dh,) = ctx.saved_tensors
        return dh * grads[0], None, None


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


# ---- the body --------------------------------------------------------------------------------------------------------
Body = Callable[[Tensor, Tensor], Tensor]
_probed: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # what the probe of a model has shown


@dataclass(frozen=True)
class Tree:
    """The different beginnings among the rows of a batch (rows, time), one node each, as far as they are needed.

    first (nodes,)        the place in rows·time where a node's token stands first
    of    (rows·time,)    the node of every place; of places behind the last needed one, any
    """

    first: Tensor
    of: Tensor


def tree_of(ids: Tensor, at: Tensor, parts: int = 1) -> Tree | None:
    """The tree of ids (rows, time) with what is needed for the places `at` of rows·time; within each of so many equal
    parts of the rows, which other adapters may compute. None where these differ in how much they have or need."""
    rows, time = ids.shape
    last, needed = [-1] * rows, [0] * parts
    for place in at.tolist():
        last[place // time] = max(last[place // time], place % time)
        needed[place * parts // (rows * time)] += 1
    first: list[int] = []
    of = [0] * (rows * time)
    sizes = set()
    for part in range(parts):
        begin, nodes = len(first), {}
        for row in range(part * rows // parts, (part + 1) * rows // parts):
            node = -1
            for t, token in enumerate(ids[row, : last[row] + 1].tolist()):
                place = row * time + t
                node = nodes.setdefault((node, token), len(first))
                if node == len(first):
                    first.append(place)
                of[place] = node
        sizes.add((len(first) - begin, needed[part]))
    if len(sizes) > 1:
        return None
    return Tree(torch.tensor(first, device=ids.device), torch.tensor(of, device=ids.device))


def short_of_even(x: Tensor, n: int | None = None) -> int:
    """How many rows are added to n (those of x) rows like x's, so that products of a few sizes serve all batches.

    oneDNN makes a program for every size of a product in bfloat16, which takes as long as the product, and keeps it.
    """
    dear = x.dtype == torch.bfloat16 and x.device.type == "cpu"
    return -(len(x) if n is None else n) % EVEN if dear else 0


def others(places: Tensor, n: int, total: int) -> Tensor:
    """`places` and n more of 0 … total − 1, all different, as far as there are others."""
    if not n:
        return places
    free = torch.ones(total, dtype=torch.bool, device=places.device)
    free[places] = False
    return torch.cat([places, free.nonzero().squeeze(1)[:n]])


def beginnings(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens are computed for rows of tokens that go through the body together."""
    nodes: dict[tuple[int, int], int] = {}
    for row in rows:
        node = -1
        for token in row:
            node = nodes.setdefault((node, token), len(nodes))
    return len(nodes)


def looks_like_llama(model: nn.Module) -> bool:
    """Whether `body` may know it; without the probe, which takes a forward pass."""
    return _base(model) is not None


def loss_of(head: nn.Module, h: Tensor, targets: Tensor) -> Tensor | None:
    """The sum of losses of h (n, hidden) under a frozen head without bias; None where the head is something else."""
    if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad or watched(head):
        return None
    return cast(Tensor, Loss.apply(h, head.weight, targets))


def body(model: nn.Module) -> Body | None:
    """ids (rows, time), places `at` (n,) in rows·time -> their hidden states (n, hidden), as `model.base_model` gives
    them; None for a model of another kind."""
    base = _base(model)
    if base is None:
        return None

    def run(ids: Tensor, at: Tensor) -> Tensor:
        if _watched_inside(base):
            return base(input_ids=ids, use_cache=False)[0].flatten(0, 1)[at]
        acting = [a for a in book_of(model).adapters.values() if a.on and not a.merged]
        parts = max((a.parts for a in acting), default=1)
        tree = None
        if ids.shape[0] % parts == 0 and not any(a.spec.dropout for a in acting):  # which draws for every place
            tree = tree_of(ids, at, parts)
        if tree is None or parts > 1:
            return _run(base, ids, at, tree)
        like = base.embed_tokens.weight
        first = others(tree.first, short_of_even(like, len(tree.first)), ids.numel())
        more = others(at, short_of_even(like, len(at)), ids.numel())
        return _run(base, ids, more, Tree(first, tree.of))[: len(at)]

    if model not in _probed:
        on = [a._switch for a in book_of(model).adapters.values() if a.on]
        for switch in on:  # the models' own arithmetic is asked for; what adapters add goes through their modules
            switch.on = False
        try:
            _probed[model] = _same(base, run)
        finally:
            for switch in on:
                switch.on = True
    return run if _probed[model] else None


def _run(base: Any, ids: Tensor, at: Tensor, tree: Tree | None) -> Tensor:
    rows, time = ids.shape
    layers = base.layers[: base.config.num_hidden_layers]
    first = torch.arange(rows * time, device=ids.device) if tree is None else tree.first
    shared = tree is not None and len(first) < rows * time
    x = base.embed_tokens(ids.reshape(-1)[first])
    cos, sin = _angles(base, x, first % time)
    for i, layer in enumerate(layers):
        attn, mlp = layer.self_attn, layer.mlp
        n = _norm(layer.input_layernorm, x)
        q, k, v = (m(n) for m in (attn.q_proj, attn.k_proj, attn.v_proj))
        q, k = (cast(Tensor, Rotate.apply(t.view(len(n), -1, attn.head_dim), cos, sin)).flatten(1) for t in (q, k))
        if tree is not None and shared:
            q, k, v = (cast(Tensor, Spread.apply(t, tree.of)) for t in (q, k, v))
        q, k, v = (t.view(rows, time, -1, attn.head_dim).transpose(1, 2) for t in (q, k, v))
        a = attention(q, k, v, attn.scaling).transpose(1, 2).reshape(rows * time, -1)
        if tree is not None and i == len(layers) - 1:  # only what is asked for: no layer attends to the rest
            a, x = cast(Tensor, Pick.apply(a, at)), cast(Tensor, Spread.apply(x, tree.of[at]))
        elif shared:
            a = cast(Tensor, Pick.apply(a, first))
        x = x + attn.o_proj(a)
        n = _norm(layer.post_attention_layernorm, x)
        x = x + mlp.down_proj(SwiGLU.apply(mlp.gate_proj(n), mlp.up_proj(n)))
    x = _norm(base.norm, x)
    return x[at] if tree is None else x


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`plain_attention`, by what is fastest for these."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return cast(Tensor, Attend.apply(q, k, v, scale))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


class Decoder:
    """Continues rows of text token by token, with the keys and values of all that was read kept in place.

    Called with the ids (rows, n) of what comes next and the mask (rows, all so far) that is 0 on padding, which is on
    the left. Gives the logits (rows, vocabulary) of the next token.
    """

    def __init__(self, model: nn.Module, rows: int, room: int) -> None:
        self.base, self.head, self.read = _base(model), cast(Any, model).get_output_embeddings(), 0
        config = self.base.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, room, size)
        self.kept = self.base.embed_tokens.weight.new_empty(shape)

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        (rows, n), base, begin = ids.shape, self.base, self.read
        self.read = end = begin + n
        seen: Tensor | None = None
        if begin and n > 1 or not mask.all():  # padding looks at itself, so that no row of the softmax is empty
            places = torch.arange(end, device=ids.device)
            seen = (mask[:, None, :] > 0) & (places <= places[begin:, None]) | (places == places[begin:, None])
            seen = seen[:, None]
        x = base.embed_tokens(ids.reshape(-1))
        cos, sin = _angles(base, x, (mask.cumsum(1) - 1).clamp_min(0)[:, begin:].reshape(-1))
        for layer, (keys, values) in zip(base.layers, self.kept, strict=False):
            attn, mlp = layer.self_attn, layer.mlp
            h = _norm(layer.input_layernorm, x, True)
            q, k, v = (m(h).view(rows * n, -1, attn.head_dim) for m in (attn.q_proj, attn.k_proj, attn.v_proj))
            q, k = _turn(q, cos, sin, 1.0), _turn(k, cos, sin, 1.0)
            q, k, v = (t.view(rows, n, -1, attn.head_dim).transpose(1, 2) for t in (q, k, v))
            keys[:, :, begin:end], values[:, :, begin:end] = k, v
            a = F.scaled_dot_product_attention(
                q, keys[:, :, :end], values[:, :, :end], attn_mask=seen, is_causal=seen is None and n > 1,
                scale=attn.scaling, enable_gqa=q.shape[1] != k.shape[1])  # fmt: skip
            x = x + attn.o_proj(a.transpose(1, 2).reshape(rows * n, -1))
            h = _norm(layer.post_attention_layernorm, x, True)
            x = x + mlp.down_proj(F.silu(mlp.gate_proj(h)).mul_(mlp.up_proj(h)))
        return self.head(_norm(base.norm, x.view(rows, n, -1)[:, -1], True))


def decoder(model: nn.Module, rows: int, room: int) -> Decoder | None:
    """A decoder for so many rows of at most `room` tokens; None for a model of another kind, or a watched one."""
    base = _base(model)
    return None if base is None or _watched_inside(base) or body(model) is None else Decoder(model, rows, room)


def _angles(base: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (tokens, size/2)."""
    cos, sin = base.rotary_emb(x[None], position_ids=positions[None])
    half = cos.shape[-1] // 2
    return cos[0, :, :half].to(x.dtype), sin[0, :, :half].to(x.dtype)


def _base(model: nn.Module) -> Any:
    """The body of a model that looks like LLaMA; None for another."""
    config, base = cast(Any, getattr(model, "config", None)), cast(Any, getattr(model, "base_model", None))
    if getattr(config, "model_type", None) not in FAMILIES or base is None or not hasattr(base, "rotary_emb"):
        return None
    if config.hidden_act != "silu" or getattr(config, "attention_dropout", 0.0) or _windowed(config):
        return None
    return base if base.embed_tokens.weight.dtype in CLOSE else None


def _watched_inside(base: Any) -> bool:
    layers = base.layers[: base.config.num_hidden_layers]
    return watched(base) or any(watched(m) for layer in layers for m in (layer, layer.self_attn, layer.mlp))


def _norm(module: Any, x: Tensor, decoding: bool = False) -> Tensor:
    if Adapted in type(module).__bases__ or watched(module) or module.weight.requires_grad:
        return module(x)
    if decoding:  # twice as quick for a few tokens; other last bits than training's
        return F.rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)
    return cast(Tensor, Norm.apply(x, module.weight, module.variance_epsilon))


def watched(module: Any) -> bool:
    """Whether somebody waits for a call of this very module: a hook, gradient checkpointing, or a prefix."""
    return (hooked(module) or getattr(module, "gradient_checkpointing", False)
            or isinstance(module, Adapted) and any(True for _ in module.active()))  # fmt: skip


def hooked(module: Any) -> bool:
    """Whether somebody looks at what goes into this module or comes out."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks)  # fmt: skip


def _windowed(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None) or ()
    return any(k != "full_attention" for k in kinds) or (not kinds and bool(getattr(config, "sliding_window", None)))


@torch.no_grad()
def _same(base: Any, run: Body) -> bool:
    device = base.embed_tokens.weight.device
    if device.type == "meta":
        return False
    ids = (torch.arange(10, device=device).view(2, 5) * 7 + 3) % base.embed_tokens.num_embeddings
    was = base.training
    base.eval()
    try:
        mine = run(ids, torch.arange(10, device=device))
        theirs = base(input_ids=ids, use_cache=False)[0].flatten(0, 1)
    except (AttributeError, RuntimeError, TypeError):  # a model of this name that is built otherwise
        return False
    finally:
        base.train(was)
    mine, theirs = mine.double(), theirs.double()
    close = CLOSE[base.embed_tokens.weight.dtype]
    return mine.shape == theirs.shape and bool((mine - theirs).norm() <= close * theirs.norm())
