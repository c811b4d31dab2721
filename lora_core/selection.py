"""What a spec hits in a model: matrices of the layers and around them, and vectors that are trained themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import cast

from torch import nn

from lora_core.errors import UserError, nearest, unknown
from lora_core.families import DIRECT, ENDS, TARGETS, guess
from lora_core.sites import Site, find_sites, key_is_value, weight_shape
from lora_core.spec import LoraSpec

TOP = re.compile(r"top\d{1,4}")  # the last layers


def find_ends(model: nn.Module) -> dict[str, Site]:
    """{"embed": Site, "head": Site} as far as the model has them; one and the same Site where they are tied.

    Tied is found out by identity of the parameters, not by the config's flag: a checkpoint may have a head of its own.
    """
    found: dict[str, Site] = {}
    owners = _owners(model)
    for name, getter in (("embed", "get_input_embeddings"), ("head", "get_output_embeddings")):
        try:
            module = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            continue
        if module is None or not isinstance(getattr(module, "weight", None), nn.Parameter):
            continue
        paths = owners[id(module.weight)]
        tables = [p for p in paths if isinstance(model.get_submodule(p), nn.Embedding)]
        n, d = module.weight.shape
        if tables:  # a tied head is an embedding's other side
            known = next((s for s in found.values() if s.path == tables[0]), None)
            found[name] = known or Site(
                path=tables[0], key=tables[0], target="embed", layer=None, out=d, in_=n, transposed=True, lookup=True,
                also=tuple(p for p in paths if p != tables[0]))  # fmt: skip
        elif weight_shape(module):
            found[name] = Site(path=paths[0], key=paths[0], target="head", layer=None, out=n, in_=d, also=paths[1:])
    return found


def _owners(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """{id of a parameter: the paths of the modules that have it}, the base model's own."""
    owners: dict[int, tuple[str, ...]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if ".lora" in f".{path}":
            continue
        for p in module._parameters.values():
            if p is not None:
                owners[id(p)] = (*owners.get(id(p), ()), path)
    return {k: tuple(dict.fromkeys(v)) for k, v in owners.items()}


def find_direct(model: nn.Module, spec: LoraSpec) -> dict[str, list[tuple[str, str]]]:
    """The parameters that a spec trains themselves: {"path.name": [(module path, parameter name), …]}.

    `norm` and `bias` among the targets, in the chosen layers (without a layer only when all are chosen), and
    `full` modules; a parameter that several modules share is one, with all of them. Raises UserError for what hits
    nothing.
    """
    base = getattr(model, "base_model", model)
    inner = {id(p) for p in base.parameters()} if base is not model else set()
    hits: dict[int, list[tuple[str, str]]] = {}
    used: set[str] = set()
    modules = [(p, m) for p, m in model.named_modules(remove_duplicate=False) if ".lora" not in f".{p}"]
    named = {p for p, m in modules if p and any(True for _ in m.parameters())}
    named |= {f"{p}.{n}" for p, m in modules for n, w in m._parameters.items() if w is not None}
    tops = {n: _top(model, n) for n in spec.full if TOP.fullmatch(n)}
    for name in spec.full:
        if name == "head" and base is model:
            raise UserError(f"{type(model).__name__} is a bare body without a head; name modules to train in full")
        if name not in ("head", "all", *tops, *named):
            raise unknown("module", name, sorted(named), f"in {type(model).__name__}")
    for path, module in modules:
        layer = re.search(r"(?:^|\.)(\d+)\.", path)
        chosen = spec.layers == "all" or (layer is not None and int(layer[1]) in spec.layers)
        for name, p in module._parameters.items():
            if p is None:
                continue
            why = [t for t in DIRECT if t in spec.targets and chosen and _is(t, module, name)]
            why += [n for n in spec.full if f"{path}.{name}".startswith(f"{n}.") or f"{path}.{name}" == n]
            if "head" in spec.full and id(p) not in inner:
                why.append("head")
            if "all" in spec.full:
                why.append("all")
            why += [n for n, roots in tops.items() if f"{path}.{name}".startswith(roots)]
            if why:
                used.update(why)
                hits.setdefault(id(p), []).append((path, name))
    for name in (*(t for t in DIRECT if t in spec.targets), *spec.full):
        if name not in used:
            where = "" if spec.layers == "all" or name in spec.full else f", layers {', '.join(map(str, spec.layers))}"
            raise UserError(f"{name!r} hits nothing in {type(model).__name__}{where}")
    return {f"{places[0][0]}.{places[0][1]}": places for places in hits.values()}


def _top(model: nn.Module, name: str) -> tuple[str, ...]:
    """How the paths of the last so many layers begin. UserError for more layers than there are."""
    roots: dict[int, str] = {}
    for s in find_sites(model):
        if s.layer is not None and (at := re.search(rf"(?:^|\.){s.layer}\.", s.path)):
            roots[s.layer] = s.path[: at.end()]
    n = int(name[3:])
    if not 1 <= n <= len(roots):
        raise UserError(f"{name!r} in a model of {len(roots)} layers; name from top1 to top{len(roots)}")
    return tuple(roots[i] for i in sorted(roots)[-n:])


def _is(target: str, module: nn.Module, name: str) -> bool:
    return name == "bias" if target == "bias" else "norm" in type(module).__name__.lower() or isinstance(
        module, nn.LayerNorm)  # fmt: skip


def listing(model: nn.Module, spec: LoraSpec | None = None) -> str:
    """A dry run, as a table: what a spec would adapt, or without one every matrix by its name, and what has no name."""
    sites = select(model, spec) if spec else find_sites(model)
    lines = [
        f"{s.target:6} layer {'-' if s.layer is None else s.layer:>3}  {s.out:>6} × {s.in_:<6} {s.key}" for s in sites
    ]
    if spec is None:
        ends = {id(s): s for s in find_ends(model).values()}.values()
        lines += [f"{s.target:6} layer   -  {s.out:>6} × {s.in_:<6} {' = '.join((s.key, *s.also))}" for s in ends]
        named = {p for s in (*sites, *ends) for p in (s.path, *s.also)}
        rest = [p for p, m in model.named_modules() if weight_shape(m) and p not in named and ".lora." not in p]
        lines += [f"{'-':6} by its path alone            {p}" for p in rest]
    return "\n".join(lines)


def path_site(model: nn.Module, path: str) -> Site:
    """The whole matrix of the module at a path, whatever it is called. UserError when there is none."""
    modules = dict(model.named_modules(remove_duplicate=False))
    module = modules.get(path)
    shape = weight_shape(module)
    if shape is None and not isinstance(module, nn.Embedding):
        paths = [p for p, m in modules.items() if weight_shape(m) is not None and ".lora." not in p]
        raise unknown("module", path, paths, f"in {type(model).__name__}")
    for end in find_ends(model).values():
        if path in (end.path, *end.also):
            return end
    target, layer = guess(path)
    if shape is None:
        n, d = cast(nn.Embedding, module).weight.shape
        return Site(path=path, key=path, target=target, layer=layer, out=d, in_=n, transposed=True, lookup=True)
    return Site(path=path, key=path, target=target, layer=layer, out=shape[0], in_=shape[1], transposed=shape[2])


def select(model: nn.Module, spec: LoraSpec) -> list[Site]:
    """The sites that a spec hits, in the order of the layers; `norm` and `bias` are no matrices (see `find_direct`).

    Raises UserError for a target or a layer that hits nothing, for a rank above the smaller side of a matrix, and for
    what an embedding or an expert cannot have.
    """
    sites, ends = find_sites(model), find_ends(model)
    names = list(dict.fromkeys(s.target for s in sites))
    layers = sorted({s.layer for s in sites if s.layer is not None})
    by_key = {s.key: s for s in sites}
    paths = {p for p, _ in model.named_modules(remove_duplicate=False)}
    chosen: dict[str, Site] = {}
    for target in spec.targets:
        if target in names:
            hits = [s for s in sites if s.target == target]
        elif target in DIRECT:
            continue
        elif target in ends:
            hits = [ends[target]]
        elif target in by_key:
            hits = [by_key[target]]
        elif target not in TARGETS and ("." in target or target in paths):
            hits = [path_site(model, target)]
        else:
            raise UserError(_no_matrix(model, target, names))
        chosen |= {s.key: s for s in hits}
    if spec.layers != "all":
        wrong = [i for i in spec.layers if i not in layers]
        if wrong:
            raise UserError(f"no layer {wrong[0]} in {type(model).__name__}; its layers are 0 to {layers[-1]}" if layers
                            else f"{type(model).__name__} has no layers that this library can number")  # fmt: skip
        chosen = {k: s for k, s in chosen.items() if s.layer is None or s.layer in spec.layers}
        for target in spec.targets:
            if target in names and not any(s.target == target for s in chosen.values()):
                where = f"target {target!r} hits nothing in layers {', '.join(map(str, spec.layers))}"
                both = target == "v" and set(spec.layers) <= set(key_is_value(sites))
                raise UserError(where + ("; there k is also v: name k" if both else ""))
    _check_patterns(spec, chosen.values())
    for s in chosen.values():
        _check_kind(spec, s)
    for s in chosen.values():
        rank = spec.rank_of(s.key, s.path, s.target)
        if rank > min(s.out, s.in_):
            raise UserError(f"rank {rank} is above the smaller side of {s.key} ({s.out}×{s.in_}); "
                            f"the largest rank possible there is {min(s.out, s.in_)}")  # fmt: skip
    order = {s.key: i for i, s in enumerate(sites)}
    return sorted(chosen.values(), key=lambda s: order.get(s.key, len(order)))


def _check_kind(spec: LoraSpec, s: Site) -> None:
    """What a matrix that is looked up, or is a slice of the experts' parameter, cannot have."""
    kind = "an embedding" if s.lookup else "an expert of a mixture" if s.expert is not None else None
    if kind is None:
        return
    refused = {
        "dora=True": spec.dora,
        "init='gradient'": spec.init == "gradient",
        "train_A=False": not spec.train_A and s.lookup,  # an embedding's A begins at zero, and would stay there
        "dropout": spec.dropout > 0 and s.expert is not None,  # the experts' input is nowhere to be had
    }
    for what, given in refused.items():
        if given:
            raise UserError(f"{s.key} is {kind}, which cannot have {what}; leave out target {s.target!r} or {what}")


def _check_patterns(spec: LoraSpec, sites: Iterable[Site]) -> None:
    names = {n for s in sites for n in (s.key, s.path, s.target)}
    for what in ("rank_pattern", "alpha_pattern"):
        for name in dict(getattr(spec, what)):
            if name not in names:
                raise unknown(f"{what} name", name, sorted(names))


def _no_matrix(model: nn.Module, target: str, names: list[str]) -> str:
    near = nearest(target, names)
    if target in ENDS:
        return (f"no {target!r} in {type(model).__name__}: " + (
            "a classifier's head is trained in full, with full=('head',)" if target == "head"
            else "it has no input embedding that transformers knows"))  # fmt: skip
    if not names:
        return (f"no matrix {target!r}: {type(model).__name__} is an architecture without named matrices here; "
                "give module paths instead, such as those that model.named_modules() lists")  # fmt: skip
    hint = f" (did you mean {near!r}?)" if near else ""
    return f"no matrix {target!r} in {type(model).__name__}; this model has {' '.join(names)}{hint}"
