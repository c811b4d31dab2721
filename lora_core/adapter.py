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

from lora_core.adapted import Adapted, adapt, restore
from lora_core.delta import Delta
from lora_core.errors import UserError, unknown
from lora_core.layers import Factors, Switch
from lora_core.merging import Merging, rewrite
from lora_core.methods.added import KINDS, by_host, fresh_added
from lora_core.quantised import Bits, check_merge
from lora_core.registry import book_of, get_adapter
from lora_core.selection import find_direct, select
from lora_core.sites import Site, plain_weight
from lora_core.spec import LoraSpec
from lora_core.starts import initial_A, pissa
from lora_core.swaps import Copies, Experts


class Adapter(Merging):
    """ΔW = s·B·A for every site of a spec, attached to a model. Made by `attach` and `load_adapter`.

    name    how `switch`, `rows` and `generate` call it
    sites   the adapted matrices, {key: Site}
    copies  what is trained itself (norms, biases, a head), {"module path.parameter": its trained copy}
    added   what is new beside them (bottlenecks, prefixes), {"module path.kind.name": parameter}
    info    what was stored beside it: model, task, template, recipe, losses
    """

    def __init__(self, model: nn.Module, spec: LoraSpec, name: str, sites: Sequence[Site]) -> None:
        self.model, self.spec, self.name = model, spec, name
        self.sites = {s.key: s for s in sites}
        self.copies: dict[str, nn.Parameter] = {}
        self.added: dict[str, nn.Parameter] = {}
        self.info: dict[str, Any] = {}
        self._switch = Switch()
        self._factors: dict[str, Factors] = {}
        self._hosts: dict[str, nn.Module] = {}

    def __repr__(self) -> str:
        n = sum(p.numel() for _, p in self.named_parameters())
        direct = f", {len(self.copies)} trained copies" if self.copies else ""
        direct += "".join(f", {n} {v}" for n in KINDS if (v := getattr(self.spec, n)))
        return (
            f"Adapter({self.name!r}, {len(self.sites)} matrices{direct}, {n:,} parameters"
            f"{', merged' if self.merged else ''})"
        )

    # ---- what it is made of
    def factors(self, key: str) -> Factors:
        """A (r, in), B (out, r), scaling and rows of one site."""
        if key not in self._factors:
            raise unknown("adapted matrix", key, self._factors, f"in adapter {self.name!r}")
        return self._factors[key]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable tensors: A and B of every site (B alone where spec.train_A is False), and the copies."""
        for _, p in self.named_parameters():
            if p.requires_grad:
                yield p

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """("{key}.A", A) and ("{key}.B", B) of every site, ".m" and ".g" where it has them; ("path.name", copy) and
        ("path.kind.name", parameter) of what is added."""
        for key, f in self._factors.items():
            yield from ((f"{key}.{n}", p) for n, p in (("A", f.A), ("B", f.B), ("m", f.m), ("g", f.g)) if p is not None)
        yield from self.copies.items()
        yield from self.added.items()

    def ranks(self) -> dict[str, int]:
        """{key: directions whose gate is open}: the learned ranks of a spec with a mask, else the ranks."""
        return {k: f.A.shape[0] if f.g is None else int((f.g != 0).sum()) for k, f in self._factors.items()}

    @torch.no_grad()
    def shrink(self, lr: float) -> None:
        """Pull every gate towards 0 by lr·mask, and to exactly 0 if it is nearer: the proximal step of mask·|g|."""
        for f in self._factors.values():
            if f.g is not None:
                f.g.copy_(f.g.sign() * (f.g.abs() - lr * self.spec.mask).clamp_min(0))

    def delta(self, key: str) -> Delta:
        """ΔW (out, in) of one site, as a copy of its factors. DoRA's has full rank: then one factor is ΔW itself."""
        f = self.factors(key)
        if f.m is None:
            B, A = f.factored()
            return Delta(B.clone(), A.clone(), f.scaling)
        whole = f.dense(f.A.dtype, self.W0(key))
        eye = torch.eye(min(whole.shape), dtype=whole.dtype, device=whole.device)
        return Delta(eye, whole) if whole.shape[0] <= whole.shape[1] else Delta(whole, eye)

    def deltas(self) -> dict[str, Delta]:
        """{key: Delta} of every site, in the order of the layers."""
        return {key: self.delta(key) for key in self._factors}

    def W0(self, key: str) -> Tensor:
        """The frozen matrix (out, in) of one site, as it was before any merge."""
        self.factors(key)
        site = self.sites[key]
        module = self.model.get_submodule(site.path)
        kept = book_of(self.model).kept.get(cast(nn.Parameter, module._parameters[site.param]))
        W = plain_weight(module, site.param) if kept is None else kept.plain if isinstance(kept, Bits) else kept
        return site.of(W).detach().clone()

    # ---- on and off
    @property
    def parts(self) -> int:
        """Into how many parts `rows` has cut the batch for this adapter; 1 where it acts on all of it."""
        return 1 if self._switch.rows is None else self._switch.batch

    @property
    def on(self) -> bool:
        return self._switch.on

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

    # ---- attach and detach
    def detach(self) -> None:
        """Take the adapter off the model: the modules, their weights and what was trainable are as before it came."""
        self._attached()
        self.unmerge()
        for host in self._hosts.values():
            store = cast(Adapted, host).lora
            for k in [k for k in store if k.startswith(f"{self.name}:")]:
                del store[k]
            if not len(store):
                restore(host)
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


def attach(model: nn.Module, spec: LoraSpec, name: str = "default", *, seed: int = 0) -> Adapter:
    """A fresh adapter on a model: A random, B = 0, so ΔW = 0 and the outputs are bit-identical (section 4.1).

    A bottleneck begins as the identity too; a prefix is seen at once. All of the model's own parameters are frozen
    until the last adapter is detached. The factors are float32 (float64 on a float64 model), on the device of their
    matrix. `seed` draws A. Raises UserError when the spec hits nothing,
    asks for an impossible rank, or the name is taken.
    """
    sites = select(model, spec)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for s in sites:
        rank = spec.rank_of(s.key, s.path, s.target)
        A, B = initial_A(spec.init, rank, s.in_, generator), torch.zeros(s.out, rank)
        if s.lookup:  # a column of A is one word's: zero at first, as in the paper's code, and B is random instead
            A, B = torch.zeros_like(A), B.normal_(generator=generator)
        tensors[s.key] = (A, B, spec.scale(rank, spec.alpha_of(s.key, s.path, s.target)))
    adapter = put_on(model, spec, name, sites, tensors, added=fresh_added(model, spec, seed))
    if spec.init == "pissa":
        pissa(adapter, seed)
    return adapter


def put_on(model: nn.Module, spec: LoraSpec, name: str, sites: Sequence[Site],
           tensors: Mapping[str, tuple[Tensor, Tensor, float]], magnitudes: Mapping[str, Tensor] | None = None,
           copies: Mapping[str, Tensor] | None = None,
           added: Mapping[str, Tensor] | None = None) -> Adapter:  # fmt: skip
    """Attach given factors {key: (A (r, in), B (out, r), s)}; what `attach` and `load_adapter` share.

    magnitudes {key: m (out,)} and copies {"path.name": value} are those of a stored adapter; None for fresh ones.
    added {"path.kind.name": value}: bottlenecks and prefixes.
    """
    if not re.fullmatch(r"[\w-]{1,100}", name):
        raise UserError(f"{name!r} cannot name an adapter; use letters, digits, - and _")
    book = book_of(model)
    if name in book.adapters:
        raise UserError(f"an adapter named {name!r} is attached already; detach it, or choose another name")
    if spec.dora and book.kept:
        raise UserError("an adapter is merged into the weights, and DoRA must measure W0: unmerge() it first")
    direct = find_direct(model, spec)
    if not sites and not direct and not added:
        raise UserError("nothing to adapt: the targets name no matrix and no vector of this model")
    for p in model.parameters():
        p.requires_grad_(False)
    adapter = Adapter(model, spec, name, sites)

    def host(path: str) -> Adapted:
        return cast(Adapted, adapter._hosts.setdefault(path, adapt(model.get_submodule(path))))

    for s in sites:
        module = host(s.path)
        weight = cast(nn.Parameter, cast(nn.Module, module)._parameters[s.param])
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        A, B, scaling = tensors[s.key]
        f = Factors(A.to(weight.device, dtype), B.to(weight.device, dtype), scaling, s.rows, adapter._switch,
                    spec.dropout, lookup=s.lookup, transposed=s.transposed)  # fmt: skip
        f.to(weight.device).train(cast(nn.Module, module).training)
        if spec.dora:
            given = (magnitudes or {}).get(s.key)
            W0 = s.of(plain_weight(cast(nn.Module, module), s.param))
            f.m = nn.Parameter(f.lengths(W0) if given is None else given.to(weight.device, dtype))
        if spec.mask:
            f.g = nn.Parameter(torch.ones(f.A.shape[0], dtype=dtype, device=weight.device))
        adapter._factors[s.key] = f
        if s.expert is None:
            for path in (s.path, *s.also):
                host(path).lora[f"{name}:{s.target.replace('.', '-')}"] = f
            continue
        key = f"{name}:{s.param}"
        if key not in module.lora:
            module.lora[key] = Experts(adapter._switch, s.param)
        cast(Experts, module.lora[key]).add(f, s)
    for full, places in direct.items():
        own = cast(nn.Parameter, model.get_submodule(places[0][0])._parameters[places[0][1]])
        value = (copies or {}).get(full, own).detach().to(own.device)
        copy = nn.Parameter(value.to(torch.float64 if own.dtype == torch.float64 else torch.float32, copy=True))
        adapter.copies[full] = copy
        for path, param in places:
            store = host(path).lora
            if f"{name}:copies" not in store:
                store[f"{name}:copies"] = Copies(adapter._switch)
            cast(Copies, store[f"{name}:copies"]).of[param] = copy
    for (path, kind), values in by_host(added or {}).items():
        own = next(model.get_submodule(path).parameters())
        dtype = torch.float64 if own.dtype == torch.float64 else torch.float32
        part = KINDS[kind](adapter._switch, {n: v.detach().to(own.device, dtype, copy=True) for n, v in values.items()})
        host(path).lora[f"{name}:{kind}"] = part
        adapter.added |= {f"{path}.{kind}.{n}": p for n, p in part.named_parameters()}
    book.adapters[name] = adapter
    for a in book.adapters.values():
        for n, p in a.named_parameters():
            p.requires_grad_(a.spec.train_A or not n.endswith(".A"))
    return adapter


def switch(model: nn.Module, old: str | None, new: str | None) -> None:
    """From one task to another: afterwards only `new` acts (None: the base model alone).

    Where `old` was merged, its weights' exact bits are put back and `new` is merged in its place (section 4.1 swaps
    by subtracting BA and adding B'A', which rounds at every swap); else it is two assignments.
    """
    target = get_adapter(model, new) if new is not None else None
    leaves = get_adapter(model, old) if old is not None else None
    merged = leaves is not None and leaves.merged
    if leaves is not None and target is not None and merged and target is not leaves:
        target._check_mergeable()  # what cannot be merged is told before anything changes
        check_merge(target, False)
        leaves._switch.merged = leaves._switch.on = False
        target._switch.merged = True
        rewrite(model, {**leaves.weights(), **target.weights()})  # once, for both
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
    """Within the block, row i of every batch is computed with adapter names[i] alone, or with none; of a batch of n
    times as many rows, its i-th n rows.

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
