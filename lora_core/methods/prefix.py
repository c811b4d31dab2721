"""Prefix tuning (Li & Liang, arXiv 2101.00190; PreLayer in the paper's tables).

    softmax(q·[P_K; K]ᵀ/√d)·[P_V; V]        P_K, P_V (l, d) of every layer, trained

Every layer attends to l trained keys and values before those of the text: l tokens that were never written. They stand
in no cache and take no position, and no mask hides them; at every step attention is so much longer (section 3).

A fresh prefix is what l drawn tokens of the vocabulary give in each layer, which trains better than noise, as Li and
Liang found. It is no beginning at zero: the model writes something else from the first step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_core.errors import UserError
from lora_core.methods.part import Added, Shapes

if TYPE_CHECKING:
    from lora_core.spec import LoraSpec

NAME = "lora_lab"


class Through:
    """A module's config as it is, but that attention goes through `how`."""

    _attn_implementation = NAME

    def __init__(self, own: Any, how: Callable[..., Any]) -> None:
        self.own, self.how = own, how

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["own"], name)


ALL_ATTENTION_FUNCTIONS.register(NAME, lambda module, *args, **more: module.config.how(module, *args, **more))


@contextmanager
def attending(host: Any, how: Callable[..., Any]) -> Iterator[None]:
    """Within the block the host's attention is how(inner, host, query, key, value, mask, …); inner: what it was."""
    own = host.config
    inner = own.how if isinstance(own, Through) else _plain(host)
    host.config = Through(own, partial(how, inner))
    try:
        yield
    finally:
        host.config = own


def _plain(host: Any) -> Callable[..., Any]:
    """How a module of transformers computes attention. UserError where it does that in a way of its own."""
    files = [sys.modules[c.__module__] for c in type(host).__mro__]
    code = next((f for f in files if hasattr(f, "ALL_ATTENTION_FUNCTIONS")), None)
    kind = getattr(getattr(host, "config", None), "_attn_implementation", None)
    if code is None or kind not in ("eager", "sdpa"):
        raise UserError(f"{type(host).__name__} computes attention in a way of its own, which no prefix can enter")
    return ALL_ATTENTION_FUNCTIONS.get_interface(kind, getattr(code, "eager_attention_forward", None))  # pyright: ignore


class Prefix(Added):
    """K and V (l, width of all key heads) before those of an attention module."""

    kind = "prefix"
    K: Tensor
    V: Tensor

    @staticmethod
    def shapes(model: nn.Module, spec: LoraSpec) -> Shapes:
        from lora_core.sites import find_sites

        config, length = cast(Any, model).config, spec.prefix
        most = getattr(config, "max_position_embeddings", None)
        if getattr(config, "is_encoder_decoder", False):
            raise UserError(f"{type(model).__name__} has attention of several kinds; a prefix is for one side alone")
        if isinstance(most, int) and length >= most:
            raise UserError(f"a prefix of {length} tokens; {type(model).__name__} reads at most {most}")
        found: Shapes = {}
        for s in find_sites(model):
            if s.target in ("k", "v") and (spec.layers == "all" or s.layer in spec.layers):
                found.setdefault(s.path.rpartition(".")[0], {})[s.target.upper()] = (length, s.out)
        if not found:
            raise UserError(f"{type(model).__name__} has no keys and values that a prefix could stand before")
        for path in found:
            _plain(model.get_submodule(path))
        return found

    @staticmethod
    @torch.no_grad()
    def fresh(model: nn.Module, spec: LoraSpec, shapes: Shapes, generator: torch.Generator) -> dict[str, Any]:
        from lora_core.evaluate import only

        found: dict[str, Any] = {}

        def keep(path: str, inner: Any, host: Any, query: Tensor, key: Tensor, value: Tensor, *a: Any, **k: Any) -> Any:
            found[path] = {n: t[0].transpose(0, 1).flatten(1).clone() for n, t in (("K", key), ("V", value))}
            return inner(host, query, key, value, *a, **k)

        own, was = cast(Any, model), model.training
        ids = torch.randint(own.config.vocab_size, (1, spec.prefix), generator=generator)
        model.eval()
        try:
            with ExitStack() as stack:
                stack.enter_context(only(model, None))
                for path in shapes:
                    stack.enter_context(attending(model.get_submodule(path), partial(keep, path)))
                own.base_model(input_ids=ids.to(next(model.parameters()).device))
        finally:
            model.train(was)
        return found

    @staticmethod
    def changes(name: str) -> bool:
        return True  # keys of zero still take their share of the softmax

    def around(self, host: nn.Module) -> AbstractContextManager[None]:
        return attending(host, self.prepend)

    def prepend(self, inner: Callable[..., Any], host: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                mask: Tensor | None, **more: Any) -> Any:  # fmt: skip
        """query (rows, heads, time, size), key and value (rows, key heads, all times, size), mask (rows or 1, 1, time,
        all times): true, or 0, where one may look."""
        rows, time, times = len(key), query.shape[2], key.shape[2]
        causal = more.pop("is_causal", None)
        causal = getattr(host, "is_causal", True) if causal is None else causal
        seen = self._seen(rows, key.device)
        low = torch.finfo(query.dtype).min
        if mask is None and (seen is not None or (causal and time > 1)):
            mask = query.new_zeros(1, 1, time, times)
            if causal:
                mask += torch.full_like(mask, low).triu(times - time + 1)
        if mask is not None:
            first = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
            shape = (rows if seen is not None else mask.shape[0], *mask.shape[1:3])
            before = first(*shape, len(self.K))
            if seen is not None:
                before.masked_fill_(~seen[:, None, None, None], False if mask.dtype == torch.bool else low)
            mask = torch.cat([before, mask.expand(*shape, -1)], dim=-1)
        key, value = (torch.cat([self._heads(p, x), x], dim=2) for p, x in ((self.K, key), (self.V, value)))
        return inner(host, query, key, value, mask, is_causal=False, **more)

    def _heads(self, p: Tensor, x: Tensor) -> Tensor:
        """A prefix (l, width) as x (rows, heads, times, size) is."""
        return p.to(x.dtype).view(len(p), x.shape[1], -1).transpose(0, 1).expand(len(x), -1, -1, -1)

    def _seen(self, rows: int, device: torch.device) -> Tensor | None:
        """Which rows of the batch have this prefix; None for all."""
        if self.switch.rows is None:
            return None
        if rows % self.switch.batch:
            raise ValueError(f"rows() was given {self.switch.batch} adapters, and attention has {rows} rows")
        mine = torch.zeros(self.switch.batch, dtype=torch.bool, device=device)
        mine[self.switch.rows] = True
        return mine.repeat_interleave(rows // self.switch.batch)
