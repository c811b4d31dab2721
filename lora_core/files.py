"""Adapters on disk: PEFT's directory format, and what PEFT has no words for. Safetensors only, never pickle.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, which PEFT reads (`peft_format` has their rules),
and `lora_lab.json`, which adds which slice of a fused module a matrix is, which modules share a weight, and where the
adapter comes from. Slices of one fused module (GPT-2's q and v in c_attn) are written as one equivalent adapter of the
whole module: their A's stacked, their B's as blocks on their own rows; experts as the blocks of one parameter.
Reading needs numpy alone; only attaching to a model needs torch. `saving` has what is written how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_core.errors import UserError
from lora_core.families import Layout, guess
from lora_core.peft_format import (
    CONFIG,
    EXPERTS,
    LAB,
    WEIGHTS,
    Parts,
    check_config,
    is_saved,
    parse,
    read_json,
    read_tensors,
    unit_key,
)
from lora_core.spec import LoraSpec
from lora_core.stored import Stored, StoredSite

if TYPE_CHECKING:
    from torch import nn

    from lora_core.adapter import Adapter
    from lora_core.sites import Site


# ---- reading -----------------------------------------------------------------------------------------------------
def read_adapter(folder: str | Path) -> Stored:
    """An adapter's factors and settings from PEFT's directory format. Needs no model and no torch.

    Raises UserError, naming the file and what is wrong with it: a missing or unknown key, a wrong shape, a number that
    is not finite, a pickle in place of safetensors, a setting that this library cannot do.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"no adapter at {folder}: "
            + ("it is a file; give its folder" if folder.exists() else "there is no such folder")
        )
    config = read_json(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
        if pickles:
            raise UserError(
                f"{folder / pickles[0]} is a pickle, which can run code when opened; save the adapter as {WEIGHTS}"
            )
        raise UserError(f"{folder} has no {WEIGHTS}")
    lab = read_json(folder / LAB) if (folder / LAB).exists() else {}
    check_config(folder, config, ours=bool(lab))
    named = lab.get("copies", [])
    parts = parse(folder, config, read_tensors(folder / WEIGHTS), named if isinstance(named, list) else [])
    stored = Stored(folder=folder, config=config, sites={}, copies=parts.copies, base_weights=parts.base)
    if not lab:
        sites = {}
        for key, u in parts.units.items():
            target, layer = guess(key)
            sites[key] = StoredSite(key=key, target=target, layer=layer, **vars(u))
        return replace(stored, sites=sites)
    try:
        spec = LoraSpec.from_dict(lab["spec"])
        return replace(stored, sites=_split(parts, lab["sites"]), spec=spec, info=dict(lab.get("info", {})),
                       fresh=bool(lab.get("fresh", False)))  # fmt: skip
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError) as e:
        raise UserError(
            f"{folder / LAB} does not fit {WEIGHTS} ({e}); without it the folder reads as a plain PEFT adapter"
        ) from None


def _split(parts: Parts, sites: list[dict[str, Any]]) -> dict[str, StoredSite]:
    """Our matrices out of PEFT's modules: whole ones as they are, slices and experts out of their block."""
    out: dict[str, StoredSite] = {}
    taken: dict[str, int] = {}
    covered = {key: np.zeros(u.B.shape, bool) for key, u in parts.units.items()}
    for d in sites:
        path, param, expert = str(d["path"]), str(d.get("param", "weight")), d.get("expert")
        key = unit_key(path, param, expert)
        u = parts.units[key]
        layout = Layout(*d["layout"]) if d.get("layout") else None
        first = taken.get(key, 0)
        cols = slice(first, first + int(d["rank"]))
        taken[key] = cols.stop
        if layout is not None and (layout.full != u.B.shape[0] or not all(isinstance(n, int) for n in layout[1:])):
            raise ValueError(f"the layout of {d['key']} does not fit a weight of {u.B.shape[0]} rows")
        rows: Any = slice(None) if layout is None else layout.rows()
        covered[key][rows, cols] = True
        ratio = u.scaling / float(d["scaling"])  # 1 unless slices of one module differ in their scaling
        block = u.B[rows, cols]
        site = StoredSite(
            key=str(d["key"]), path=path, target=str(d["target"]), layer=d["layer"], layout=layout, A=u.A[cols],
            B=block if ratio == 1 else block * ratio, m=None if u.m is None else u.m[rows], alpha=u.alpha,
            scaling=float(d["scaling"]), lookup=u.lookup, param=param, expert=expert,
            also=tuple(map(str, d.get("also", ()))))  # fmt: skip
        if site.A.shape[0] != int(d["rank"]):
            raise ValueError(f"{d['key']} is said to have rank {d['rank']}")
        for other in site.also:
            twin = parts.units[other]
            A, B = (u.A, u.B) if twin.lookup == u.lookup else (u.B.T, u.A.T)
            if not (np.array_equal(twin.A, A) and np.array_equal(twin.B, B) and twin.scaling == u.scaling):
                raise ValueError(f"{other} is said to share the update of {path}")
            covered[other][:] = True
        out[site.key] = site
    for key, u in parts.units.items():
        if u.B[~covered[key]].any():  # the rest of an expert's columns is padding
            raise ValueError(f"the matrices listed for {key} are not all of it")
    return out


# ---- onto a model ------------------------------------------------------------------------------------------------
def load_into(model: nn.Module, folder: Path, name: str | None, allow_zero: bool) -> Adapter:
    """Attach a stored adapter to a model; `adapter.load_adapter` has the contract.

    Of PEFT's `bias="lora_only"` all biases of the model become copies, those that were not trained with their own
    value: the function is the same.
    """
    import re

    import torch

    from lora_core.adapter import put_on
    from lora_core.methods.added import acts
    from lora_core.registry import book_of

    stored = read_adapter(folder)
    spec = stored.spec or stored.foreign_spec()
    sites, tensors, magnitudes = [], {}, {}
    for s, site in _places(model, stored):
        if (s.B.shape[0], s.A.shape[1]) != (site.out, site.in_) or s.lookup != site.lookup:
            raise UserError(
                f"{s.key} in {folder} is {'an embedding of ' if s.lookup else ''}{s.B.shape[0]}×{s.A.shape[1]}, but the"
                f" model's matrix is {'an embedding of ' if site.lookup else ''}{site.out}×{site.in_}: the adapter was"
                f" made for another model ({stored.base or 'unnamed'})"
            )
        sites.append(site)
        tensors[s.key] = (torch.tensor(s.A), torch.tensor(s.B), s.scaling)
        if s.m is not None:
            magnitudes[s.key] = torch.tensor(s.m)
    stored, added = _added(model, stored, spec)
    copies = _copies(model, stored, spec)
    if not (allow_zero or stored.fresh or acts(added)) and not _changes(model, stored, sites, copies):
        raise UserError(
            f"every B in {folder / WEIGHTS} is zero: the adapter would change nothing."
            " If that is meant, load it with allow_zero=True"
        )
    if name is None:
        stem = re.sub(r"[^\w-]", "_", folder.resolve().name)[:80] or "adapter"
        taken = book_of(model).adapters
        name = next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)
    adapter = put_on(model, spec, name, sites, tensors, magnitudes, copies, added)
    adapter.info = dict(stored.info)
    return adapter


def _places(model: nn.Module, stored: Stored) -> list[tuple[StoredSite, Site]]:
    """Every stored matrix with its place in the model; the equal halves of a tied matrix as one."""
    from lora_core.sites import find_sites

    known = {unit_key(s.path, s.param, s.expert): s for s in find_sites(model) if s.expert is not None}
    hosts = {s.key: _host(model, s, known) for s in stored.sites.values()}
    found: dict[str, tuple[StoredSite, Site]] = {}
    for s in sorted(stored.sites.values(), key=lambda s: not s.lookup):
        host, also = hosts[s.key], s.also
        weight = getattr(model.get_submodule(host.path), host.param)
        for other in also:
            if getattr(_module(model, other), "weight", None) is not weight:
                raise UserError(f"{stored.folder} was made for a model where {other} and {s.path} share a weight")
        first = next((k for k, (t, _) in found.items() if stored.spec is None and _twins(s, t) and weight is getattr(
            model.get_submodule(t.path), t.param)), None)  # fmt: skip
        if first is not None:
            t, site = found[first]
            found[first] = (t, replace(site, also=(*site.also, s.path)))
            continue
        out = s.B.shape[0] if s.layout and s.layout.full == host.out else host.out
        target = "embed" if s.lookup and stored.spec is None else s.target
        found[s.key] = (s, replace(host, key=s.key, target=target, layer=s.layer, layout=s.layout, out=out, also=also))
    return [found[k] for k in stored.sites if k in found]


def _twins(s: StoredSite, t: StoredSite) -> bool:
    """Whether t is an embedding and s the same update in another user of its weight, the transposed one in a head."""
    A, B = (t.A, t.B) if s.lookup else (t.B.T, t.A.T)
    return t.lookup and s.scaling == t.scaling and np.array_equal(s.A, A) and np.array_equal(s.B, B)


def _module(model: nn.Module, path: str) -> nn.Module | None:
    return dict(model.named_modules(remove_duplicate=False)).get(path)


def _host(model: nn.Module, s: StoredSite, experts: Mapping[str, Site]) -> Site:
    """The whole matrix at a stored site's place. UserError, with the nearest match, where the model has none."""
    from lora_core.errors import unknown
    from lora_core.selection import path_site
    from lora_core.sites import Site, weight_shape

    if s.expert is not None:
        key = unit_key(s.path, s.param, s.expert)
        if key not in experts:
            raise unknown("expert", key, experts, f"in {type(model).__name__}")
        order = [p for p in model.get_submodule(s.path)._parameters if p in EXPERTS]
        if order != sorted(order, key=EXPERTS.index):
            raise UserError(f"{s.path} has its parameters in an order of its own: whose factors are whose is not told")
        return replace(experts[key], layout=None, out=experts[key].full)
    host = path_site(model, s.path)
    if host.path != s.path or host.also:  # tied: here it is this module alone
        module = _module(model, s.path)
        shape = weight_shape(module)
        if shape is None:
            return replace(host, path=s.path, also=())
        return Site(path=s.path, key=s.key, target=s.target, layer=None, out=shape[0], in_=shape[1],
                    transposed=shape[2])  # fmt: skip
    return host


def _added(model: nn.Module, stored: Stored, spec: LoraSpec) -> tuple[Stored, dict[str, Any]]:
    """(what else is stored, bottlenecks and prefixes by their names): all that the spec has, every shape right."""
    import torch

    from lora_core.methods.added import added_shapes

    shapes, rest = added_shapes(model, spec), dict(stored.copies)
    for name, shape in shapes.items():
        value = rest.get(name)
        if value is None:
            raise UserError(f"{stored.folder / WEIGHTS} has no {name}, which the adapter adds")
        if value.shape != shape:
            raise UserError(f"{name} in {stored.folder} is {value.shape}; for this model it must be {shape}")
    added = {n: torch.tensor(rest.pop(n)) for n in shapes}
    return replace(stored, copies=rest), added


def _copies(model: nn.Module, stored: Stored, spec: LoraSpec) -> dict[str, Any]:
    """{"path.parameter": trained value} as `put_on` wants them; every one that is stored used, every shape right."""
    import torch

    from lora_core.selection import find_direct

    for name, value in stored.base_weights.items():
        path, _, param = name.rpartition(".")
        own = getattr(_module(model, path), param, None)
        if own is None or not np.allclose(own.detach().float().cpu().numpy(), value, rtol=1e-2, atol=1e-5):
            raise UserError(f"{stored.folder} comes with a {name} that is not the model's: it was made for another one")
    copies, left = {}, dict(stored.copies)
    for full, places in find_direct(model, spec).items():
        values = [left.pop(f"{p}.{n}", None) for p, n in places]
        given = [v for v in values if v is not None]
        own = getattr(model.get_submodule(places[0][0]), places[0][1])
        if not given:
            if stored.spec is not None or places[0][1] != "bias" or any(p in spec.full for p, _ in places):
                raise UserError(f"{stored.folder / WEIGHTS} has no {full}, which the adapter trains")
            continue
        if any(v.shape != tuple(own.shape) for v in given):
            raise UserError(f"{full} in {stored.folder} is {given[0].shape}, but the model's is {tuple(own.shape)}")
        if any(not np.array_equal(v, given[0]) for v in given):
            raise UserError(f"{stored.folder} has unlike values of {full}, which the model uses in several places")
        copies[full] = torch.tensor(given[0])
    saved = [] if stored.spec else stored.config.get("modules_to_save") or []
    for path, module in model.named_modules():
        for n, p in module._parameters.items() if saved and ".lora" not in path else ():
            if p is not None and f"{path}.{n}" not in stored.copies and is_saved(path, saved):
                raise UserError(f"{stored.folder / WEIGHTS} has no {path}.{n}, which {CONFIG} says is saved whole")
    if left:
        raise UserError(f"{stored.folder / WEIGHTS} has {next(iter(left))}, which {type(model).__name__} has not")
    return copies


def _changes(model: nn.Module, stored: Stored, sites: list[Site], copies: Mapping[str, Any]) -> bool:
    """Whether the adapter does anything: factors that are not zero, a copy or a magnitude that is not the model's."""
    import torch

    def own(name: str) -> Any:
        path, _, param = name.rpartition(".")
        return getattr(model.get_submodule(path), param)

    if any(s.changes for s in stored.sites.values()):
        return True
    if any(not torch.equal(v.to(own(n)), own(n)) for n, v in copies.items()):
        return True
    for site in sites:
        m = stored.sites[site.key].m
        if m is not None:
            norms = site.weight(model.get_submodule(site.path)).float().norm(dim=1).cpu()
            if not torch.allclose(torch.tensor(m).float(), norms, rtol=1e-3):
                return True
    return False


__all__ = ["CONFIG", "LAB", "WEIGHTS", "Stored", "StoredSite", "load_into", "read_adapter"]
