"""Adapter: the factors of one fine-tune on one model. Attach, detach, disable, merge, restore, switch, mix in a batch.

Adapters that are on add up: h = W0·x + Σ s·B·(A·x). Each has one Switch that all its factors share, so turning it on,
off, or on for some rows of a batch is one assignment, whatever the size of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_core.delta import Delta
from lora_core.errors import UserError, unknown
from lora_core.layers import Adapted, Factors, Switch, adapt, restore
from lora_core.sites import Site, select
from lora_core.spec import LoraSpec
from lora_core.starts import initial_A, pissa


class Registry:
    """What a model knows of its adapters: them by name, and which parameters were trainable before the first."""

    def __init__(self, model: nn.Module) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.trainable = [n for n, p in model.named_parameters() if p.requires_grad]


class Adapter:
    """ΔW = s·B·A for every site of a spec, attached to a model. Made by `attach` and `load_adapter`.

    name   how `switch`, `rows` and `generate` call it
    sites  the adapted matrices, {key: Site}
    info   what was stored beside it: model, task, template, recipe, losses
    """

    def __init__(self, model: nn.Module, spec: LoraSpec, name: str, sites: Sequence[Site]) -> None:
        self.model, self.spec, self.name = model, spec, name
        self.sites = {s.key: s for s in sites}
        self.info: dict[str, Any] = {}
        self._switch = Switch()
        self._factors: dict[str, Factors] = {}

    def __repr__(self) -> str:
        n = sum(p.numel() for _, p in self.named_parameters())
        return (
            f"Adapter({self.name!r}, {len(self.sites)} matrices, {n:,} parameters{', merged' if self.merged else ''})"
        )

    # ---- what it is made of
    def factors(self, key: str) -> Factors:
        """A (r, in), B (out, r), scaling and rows of one site."""
        if key not in self._factors:
            raise unknown("adapted matrix", key, self._factors, f"in adapter {self.name!r}")
        return self._factors[key]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable tensors: A and B of every site (B alone where spec.train_A is False)."""
        for _, p in self.named_parameters():
            if p.requires_grad:
                yield p

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """("{key}.A", A) and ("{key}.B", B) of every site."""
        for key, f in self._factors.items():
            yield from ((f"{key}.A", f.A), (f"{key}.B", f.B))

    def delta(self, key: str) -> Delta:
        """ΔW (out, in) of one site, as a copy of its factors."""
        f = self.factors(key)
        B, A = f.factored()
        return Delta(B.clone(), A.clone(), f.scaling)

    def deltas(self) -> dict[str, Delta]:
        """{key: Delta} of every site, in the order of the layers."""
        return {key: self.delta(key) for key in self._factors}

    def W0(self, key: str) -> Tensor:
        """The frozen matrix (out, in) of one site, as it was before any merge."""
        self.factors(key)
        module, site = self._host(key), self.sites[key]
        if module.W0 is None:
            return site.weight(cast(nn.Module, module)).detach().clone()
        W0 = module.W0.T if site.transposed else module.W0
        return (W0 if site.rows is None else W0[site.rows]).clone()

    # ---- on and off
    @property
    def on(self) -> bool:
        return self._switch.on

    @property
    def merged(self) -> bool:
        return self._switch.merged

    def enable(self, on: bool = True) -> None:
        """Let the adapter act, or not. A merged adapter is in the weights and must be unmerged to be off."""
        if self.merged and not on:
            raise UserError(f"adapter {self.name!r} is merged into the weights; unmerge() it before disabling it")
        self._switch.on = on

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the model computes without this adapter; a merged one is unmerged for the while."""
        was_on, was_merged = self.on, self.merged
        if was_merged:
            self.unmerge()
        self._switch.on = False
        try:
            yield
        finally:
            self._switch.on = was_on
            if was_merged:
                self.merge()

    # ---- into the weights and out again
    def merge(self) -> None:
        """Add ΔW to the weights: computed in float32 (float64 for float64 weights) and rounded once (section 4.1).

        The weights' own bits are kept aside, so that `unmerge` gives back exactly them. Needs that much memory.
        Raises UserError on a quantised base.
        """
        self._attached()
        for path in dict.fromkeys(s.path for s in self.sites.values()):
            weight = cast(Tensor, self.model.get_submodule(path).weight)
            if not weight.is_floating_point():
                raise UserError(
                    f"{path} is quantised ({weight.dtype}): it cannot take ΔW without being quantised again."
                    " Merge into the unquantised model, or go on unmerged"
                )
        if not self.merged:
            self._switch.merged = True
            self._rewrite()

    def unmerge(self) -> None:
        """Take ΔW out of the weights again; with no other adapter merged, they are W0 to the bit."""
        self._attached()
        if self.merged:
            self._switch.merged = False
            self._rewrite()

    def _rewrite(self) -> None:
        """Write W0 + the merged updates into each weight, or the kept bits where none is merged."""
        for path in dict.fromkeys(s.path for s in self.sites.values()):
            module = cast(Adapted, self.model.get_submodule(path))
            weight = cast(nn.Parameter, module.weight)  # pyright: ignore
            merged = [f for f in cast(Any, module.lora.values()) if f.switch.merged]
            with torch.no_grad():
                if module.W0 is None:
                    module.W0 = weight.detach().clone()
                if not merged:
                    weight.copy_(module.W0)
                    module.W0 = None
                    continue
                wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
                W = module.W0.to(weight.device, wide, copy=True)
                transposed = next(s.transposed for s in self.sites.values() if s.path == path)
                view = W.T if transposed else W
                for f in merged:
                    d = f.dense(wide)
                    if f.rows is None:
                        view += d
                    else:
                        view[f.rows] += d
                weight.copy_(W)

    # ---- attach and detach
    def detach(self) -> None:
        """Take the adapter off the model: the modules, their weights and what was trainable are as before it came."""
        self._attached()
        self.unmerge()
        for path in dict.fromkeys(s.path for s in self.sites.values()):
            module = cast(Adapted, self.model.get_submodule(path))
            for k in [k for k in module.lora if k.startswith(f"{self.name}:")]:
                del module.lora[k]
            if not len(module.lora):
                restore(cast(nn.Module, module))
        book = book_of(self.model)
        del book.adapters[self.name]
        if not book.adapters:
            trainable = set(book.trainable)
            for n, p in self.model.named_parameters():
                p.requires_grad_(n in trainable)
            del self.model.lora_adapters

    def save(self, folder: str | Path, info: Mapping[str, Any] | None = None) -> Path:
        """Write the adapter in PEFT's directory format (factors in float32); see `saving.save_adapter`."""
        from lora_core.saving import save_adapter

        return save_adapter(self, folder, {**self.info, **(info or {})})

    def _host(self, key: str) -> Adapted:
        return cast(Adapted, self.model.get_submodule(self.sites[key].path))

    def _attached(self) -> None:
        if book_of(self.model).adapters.get(self.name) is not self:
            raise UserError(f"adapter {self.name!r} is not attached to this model any more")


def book_of(model: nn.Module) -> Registry:
    """The model's book of adapters; made at the first call."""
    book = model.__dict__.get("lora_adapters")
    if book is None:
        book = Registry(model)
        object.__setattr__(model, "lora_adapters", book)
    return book


def attach(model: nn.Module, spec: LoraSpec, name: str = "default", *, seed: int = 0) -> Adapter:
    """A fresh adapter on a model: A random, B = 0, so ΔW = 0 and the outputs are bit-identical (section 4.1).

    All of the model's own parameters are frozen until the last adapter is detached. The factors are float32 (float64
    on a float64 model), on the device of their matrix. `seed` draws A. Raises UserError when the spec hits nothing,
    asks for an impossible rank, or the name is taken.
    """
    sites = select(model, spec)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for s in sites:
        rank = spec.rank_of(s.key, s.path, s.target)
        A = initial_A(spec.init, rank, s.in_, generator)
        scaling = spec.scale(rank, spec.alpha_of(s.key, s.path, s.target))
        tensors[s.key] = (A, torch.zeros(s.out, rank), scaling)
    adapter = put_on(model, spec, name, sites, tensors)
    if spec.init == "pissa":
        pissa(adapter, seed)
    return adapter


def put_on(model: nn.Module, spec: LoraSpec, name: str, sites: Sequence[Site],
           tensors: Mapping[str, tuple[Tensor, Tensor, float]]) -> Adapter:  # fmt: skip
    """Attach given factors {key: (A (r, in), B (out, r), s)}; what `attach` and `load_adapter` share."""
    if not re.fullmatch(r"[\w-]{1,100}", name):
        raise UserError(f"{name!r} cannot name an adapter; use letters, digits, - and _")
    book = book_of(model)
    if name in book.adapters:
        raise UserError(f"an adapter named {name!r} is attached already; detach it, or choose another name")
    for p in model.parameters():
        p.requires_grad_(False)
    for other in book.adapters.values():
        for n, p in other.named_parameters():
            p.requires_grad_(other.spec.train_A or n.endswith(".B"))
    adapter = Adapter(model, spec, name, sites)
    for s in sites:
        module = adapt(model.get_submodule(s.path))
        weight = cast(Tensor, module.weight)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        A, B, scaling = tensors[s.key]
        f = Factors(
            A.to(weight.device, dtype), B.to(weight.device, dtype), scaling, s.rows, adapter._switch, spec.dropout
        )
        f.to(weight.device).train(module.training)
        cast(Adapted, module).lora[f"{name}:{s.target.replace('.', '-')}"] = f
        f.A.requires_grad_(spec.train_A)
        adapter._factors[s.key] = f
    book.adapters[name] = adapter
    return adapter


def get_adapter(model: nn.Module, name: str) -> Adapter:
    """The attached adapter of that name; UserError with the nearest match where there is none."""
    adapters = book_of(model).adapters
    if name not in adapters:
        raise unknown("adapter", name, adapters, "on this model")
    return adapters[name]


def switch(model: nn.Module, old: str | None, new: str | None) -> None:
    """From one task to another: afterwards only `new` acts (None: the base model alone).

    Where `old` was merged, its weights' exact bits are put back and `new` is merged in its place (section 4.1 swaps
    by subtracting BA and adding B'A', which rounds at every swap); else it is two assignments.
    """
    target = get_adapter(model, new) if new is not None else None
    merged = get_adapter(model, old).merged if old is not None else False
    for a in book_of(model).adapters.values():
        if a is not target:
            a.unmerge()
            a._switch.on = False
    if target is not None:
        target._switch.on = True
        if merged:
            target.merge()


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within the block, row i of every batch is computed with adapter names[i] alone, or with none.

    Equal to one pass per row. UserError for a name that is not attached, and while one of the adapters is merged.
    """
    book = book_of(model)
    for n in names:
        if n is not None:
            get_adapter(model, n)
    for a in book.adapters.values():
        if a.merged:
            raise UserError(f"adapter {a.name!r} is merged into the weights, which all rows share; unmerge() it first")
    before = {a: (a._switch.on, a._switch.rows, a._switch.batch) for a in book.adapters.values()}
    for a in book.adapters.values():
        mine = [i for i, n in enumerate(names) if n == a.name]
        sw = a._switch
        sw.on, sw.batch = bool(mine), len(names)
        if len(mine) == len(names):
            sw.rows = None
        elif mine and mine == list(range(mine[0], mine[-1] + 1)):
            sw.rows = slice(mine[0], mine[-1] + 1)
        else:
            sw.rows = torch.tensor(mine)
    try:
        yield
    finally:
        for a, (on, some, batch) in before.items():
            a._switch.on, a._switch.rows, a._switch.batch = on, some, batch


def load_adapter(model: nn.Module, folder: str | Path, name: str | None = None, *, allow_zero: bool = False) -> Adapter:
    """Attach an adapter from PEFT's directory format, ours or PEFT's own; its outputs are PEFT's.

    name: how to call it (None: the folder's name). Strict: every key used, every shape right, every number finite;
    an adapter whose B is all zero is refused unless `allow_zero` or it says itself that it is untrained.
    Raises UserError that names what is wrong.
    """
    from lora_core.files import load_into

    return load_into(model, Path(folder), name, allow_zero)
