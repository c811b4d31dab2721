"""The fast path of a text classifier: a BERT-like body that reads no padding and ends with the first token alone.

What fast.py is to a decoder. Of a batch's rows only the real tokens go through the matrices; they are put side by side
for attention alone. The head reads the first token, so that in the last layer queries and all that comes behind
attention are computed for it alone: with six layers a seventh of the products. The model's own modules hold and
multiply by every matrix and draw every dropout, so adapters act as everywhere. What a probe shows to be computed
otherwise, and whatever hooks or checkpointing watch, is left to transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core.fast import CLOSE, hooked, others, watched
from lora_core.kernels import Pick, Place, short_of_even
from lora_core.registry import book_of

FAMILIES = ("bert",)
Reader = Callable[[Tensor, Tensor], Tensor]
_probed: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """softmax(scale·qkᵀ over what is real)·v of q (rows, heads, asking, size), k and v (rows, heads, time, size) and
    mask (rows, time), 1 where a token is real; dropout acts on the softmax."""
    scores = (scale * q @ k.transpose(-1, -2)).masked_fill(mask[:, None, None] == 0, -torch.inf)
    return F.dropout(scores.softmax(-1), dropout) @ v


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """`plain_attention` in three batched products."""
    rows, heads, asking, size = q.shape
    hidden = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask == 0, -torch.inf).repeat_interleave(heads, 0)
    q, k, v = (t.reshape(rows * heads, -1, size) for t in (q, k, v))
    p = torch.baddbmm(hidden[:, None], q, k.transpose(1, 2), alpha=scale).softmax(-1)
    return torch.bmm(F.dropout(p, dropout), v).view(rows, heads, asking, size)


def logits(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """A classifier's logits (rows, labels) for ids and mask (rows, time), as the model itself gives them."""
    m = cast(Any, model)
    read = reader(model) if type(m).__name__ == "BertForSequenceClassification" else None
    if read is None or watched(m) or hooked(m.bert.pooler):
        return m(input_ids=ids, attention_mask=mask).logits
    return m.classifier(m.dropout(m.bert.pooler(read(ids, mask)[:, None])))


def reader(model: nn.Module) -> Reader | None:
    """ids, mask (rows, time) -> the first token's hidden states (rows, hidden); None for a model of another kind, or
    one that is watched."""
    config, base = getattr(model, "config", None), cast(Any, getattr(model, "bert", None))
    if getattr(config, "model_type", None) not in FAMILIES or not hasattr(getattr(base, "encoder", None), "layer"):
        return None
    if cast(Any, config).is_decoder or base.embeddings.word_embeddings.weight.dtype not in CLOSE or _inside(base):
        return None

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        acting = [a for a in book_of(model).adapters.values() if a.on and not a.merged]
        if any(a.parts > 1 for a in acting):  # rows with their own adapters are found by their number of places
            return _run(base, ids, mask, torch.arange(ids.numel(), device=ids.device))
        at = mask.flatten().nonzero().squeeze(1)
        more = short_of_even(base.embeddings.LayerNorm.weight, len(at))
        return _run(base, ids, mask, others(at, more, ids.numel()).sort().values)

    if model not in _probed:
        on = [a._switch for a in book_of(model).adapters.values() if a.on]
        for switch in on:
            switch.on = False
        try:
            _probed[model] = _same(base, run)
        finally:
            for switch in on:
                switch.on = True
    return run if _probed[model] else None


def _run(base: Any, ids: Tensor, mask: Tensor, at: Tensor) -> Tensor:
    """at: the places of rows·time that are computed, in order, the first of every row among them."""
    rows, time = ids.shape
    if len(at) == rows * time:  # in the shape that rows with their own adapters are told apart by
        x = base.embeddings(input_ids=ids).flatten(0, 1)
    else:
        x = base.embeddings(input_ids=ids.reshape(1, -1)[:, at], position_ids=(at % time)[None])[0]
    of = torch.empty(rows * time, dtype=torch.long, device=ids.device)
    of[at] = torch.arange(len(at), device=ids.device)
    first = of[::time]  # where the first token of each row is among those that are computed
    layers = base.encoder.layer
    for i, layer in enumerate(layers):
        attn, own = layer.attention.self, layer.attention.output
        last = i == len(layers) - 1
        k, v = (_apart(m(x), at, rows, time, attn) for m in (attn.key, attn.value))
        if last:
            x = cast(Tensor, Pick.apply(x, first))
            q = attn.query(x).view(rows, 1, -1, attn.attention_head_size).transpose(1, 2)
        else:
            q = _apart(attn.query(x), at, rows, time, attn)
        dropped = attn.dropout.p if attn.training else 0.0
        a = attention(q, k, v, mask, attn.scaling, dropped).transpose(1, 2).reshape(-1, attn.all_head_size)
        a = a if last else cast(Tensor, Pick.apply(a, at))
        x = own.LayerNorm(own.dropout(own.dense(a)) + x)
        up, out = layer.intermediate, layer.output
        x = out.LayerNorm(out.dropout(out.dense(up.intermediate_act_fn(up.dense(x)))) + x)
    return x


def _apart(x: Tensor, at: Tensor, rows: int, time: int, attn: Any) -> Tensor:
    """x (tokens, hidden) as (rows, heads, time, size), zero on padding."""
    placed = cast(Tensor, Place.apply(x, at, rows * time)) if len(at) < rows * time else x
    return placed.view(rows, time, -1, attn.attention_head_size).transpose(1, 2)


def _inside(base: Any) -> bool:
    """Whether somebody looks at a module's tokens, which have another shape here, or watches one that is not called."""
    if any(hooked(m) for m in base.modules()) or watched(base) or watched(base.encoder):
        return True
    for layer in base.encoder.layer:
        attn = layer.attention
        if any(watched(m) for m in (layer, attn, attn.self, attn.output, layer.intermediate, layer.output)):
            return True
    return False


@torch.no_grad()
def _same(base: Any, run: Reader) -> bool:
    weight = base.embeddings.word_embeddings.weight
    if weight.device.type == "meta":
        return False
    ids = (torch.arange(15, device=weight.device).view(3, 5) * 7 + 3) % weight.shape[0]
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    was = base.training
    base.eval()
    try:
        mine = run(ids, mask)
        theirs = base(input_ids=ids, attention_mask=mask)[0][:, 0]
    except (AttributeError, RuntimeError, TypeError):  # a model of this name that is built otherwise
        return False
    finally:
        base.train(was)
    mine, theirs = mine.double(), theirs.double()
    return mine.shape == theirs.shape and bool((mine - theirs).norm() <= CLOSE[weight.dtype] * theirs.norm())
