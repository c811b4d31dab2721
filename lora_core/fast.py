"""The fast path of training: a LLaMA-like body and its loss.

On a CPU four fifths of a training step are the frozen weights' products. What saves most is to multiply less: a token
whose whole past is that of another one has the same hidden state, so rows that begin alike are computed once as far as
they do (`Tree`), and nothing is computed behind the last position that is asked for. Most of the rest of a step is
reading and writing activations, of which kernels.py saves some. The model's own modules still hold and multiply by
every matrix, so adapters act as everywhere.

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
from lora_core.kernels import Loss, Norm, Pick, Rotate, Spread, SwiGLU, attention, short_of_even, turn
from lora_core.registry import book_of

FAMILIES = ("llama", "mistral", "qwen2")
# How far the probe's hidden states may be from transformers', relative: rounding, which is in other places.
CLOSE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 3e-2}
Body = Callable[..., Tensor]
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


def loss_of(head: nn.Module, h: Tensor, targets: Tensor, some: bool = False) -> Tensor | None:
    """The sum of losses of h (n, hidden) under a frozen head without bias; None where the head is something else.

    some: negative targets are among them, which count nothing.
    """
    return cast(Tensor, Loss.apply(h, cast(Any, head).weight, targets, some)) if _plain_head(head) else None


def _plain_head(head: Any) -> bool:
    return type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad and not watched(head)


def plain(model: nn.Module) -> bool:
    """Whether a model's body and loss are computed here alone: its head is frozen, and nobody looks on."""
    base = _base(model)
    return (base is not None and _plain_head(cast(Any, model).get_output_embeddings()) and not _watched_inside(base)
            and not any(hooked(m) for m in base.modules()))  # fmt: skip


def body(model: nn.Module) -> Body | None:
    """ids (rows, time), places `at` (n,) in rows·time, all different -> their hidden states (n, hidden), as
    `model.base_model` gives them; None for a model of another kind. even=True says that `at` has as many places in each
    of the parts that other adapters compute."""
    base = _base(model)
    if base is None:
        return None

    def run(ids: Tensor, at: Tensor, even: bool = False) -> Tensor:
        if _watched_inside(base):
            return base(input_ids=ids, use_cache=False)[0].flatten(0, 1)[at]
        acting = [a for a in book_of(model).adapters.values() if a.on and not a.merged]
        parts = max((a.parts for a in acting), default=1)
        tree = None
        # Dropout draws for every place; a GPU is quicker with all places than with finding those that are alike.
        if ids.shape[0] % parts == 0 and ids.device.type == "cpu" and not any(a.spec.dropout for a in acting):
            tree = tree_of(ids, at, parts)
        if tree is None or parts > 1:
            return _run(base, ids, at, tree, even or parts == 1)
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


def _run(base: Any, ids: Tensor, at: Tensor, tree: Tree | None, even: bool = False) -> Tensor:
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
        if i == len(layers) - 1 and (tree or even):  # only what is asked for: no layer attends to the rest
            a = cast(Tensor, Pick.apply(a, at))
            x = cast(Tensor, Spread.apply(x, tree.of[at]) if tree else Pick.apply(x, at))
        elif shared:
            a = cast(Tensor, Pick.apply(a, first))
        x = x + attn.o_proj(a)
        n = _norm(layer.post_attention_layernorm, x)
        x = x + mlp.down_proj(SwiGLU.apply(mlp.gate_proj(n), mlp.up_proj(n)))
    x = _norm(base.norm, x)
    return x if tree or even else x[at]


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
            q, k = turn(q, cos, sin, 1.0), turn(k, cos, sin, 1.0)
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
    if decoding or x.device.type != "cpu":  # twice as quick for a few tokens; other last bits than training's
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
