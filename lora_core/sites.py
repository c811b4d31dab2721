"""Where the matrices are: logical names (q k v o gate up down embed head) -> Site (module, rows, orientation).

Transformers name and fuse their matrices differently in every family. One small table per family says where each
logical matrix lives; the rest of the library sees only Sites. A fused module (GPT-2's c_attn, GPT-NeoX's
query_key_value) holds q, k and v as *rows* of one weight; those rows need not be contiguous: in GPT-NeoX they are
interleaved by head, so a Site carries an index, and a plain slice is the fast case. The experts of a mixture are no
modules at all, but slices of one parameter (experts, out, in): a Site then names the parameter and the expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_core.errors import UserError, nearest, unknown
from lora_core.families import DIRECT, ENDS, FAMILIES, STAGES, TARGETS, TITLES, Layout, guess, inspect, pattern
from lora_core.spec import LoraSpec

Rows = slice | torch.Tensor | None  # None: all rows of the weight
WHICH = {"q": 0, "k": 1, "v": 2, "gate": 0, "up": 1}  # place among the matrices of a fused weight


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """One matrix W0 (out, in) of a model: `rows` of the weight of the module at `path`.

    path        module path, as in model.get_submodule(path)
    key         path, or path + ".q" where the matrix is a slice of a fused module: unique in a model
    target      logical name (q k v o gate up down embed head), or the path's last part for a module named by its path
    layer       index of the layer, or None outside the layers
    out, in_    sides of the matrix; an embedding's in is the vocabulary
    layout      which rows of a fused weight it is; None for a weight of its own
    transposed  the weight is stored (in, out), as transformers' Conv1D and embeddings do; rows are then its columns
    lookup      the module is an embedding
    also        the other modules that use the same weight (tied): the update acts in all of them
    param       the parameter's name; expert: which of its first axis, for the experts of a mixture
    """

    path: str
    key: str
    target: str
    layer: int | None
    out: int
    in_: int
    layout: Layout | None = None
    transposed: bool = False
    lookup: bool = False
    also: tuple[str, ...] = ()
    param: str = "weight"
    expert: int | None = None

    @property
    def rows(self) -> Rows:
        """Which rows of the weight it is: None for all, a slice, or an index (out,)."""
        rows = None if self.layout is None else self.layout.rows()
        return torch.from_numpy(rows) if isinstance(rows, np.ndarray) else rows

    @property
    def full(self) -> int:
        """Rows of the whole weight that the matrix is a part of."""
        return self.out if self.layout is None else self.layout.full

    def of(self, stored: torch.Tensor) -> torch.Tensor:
        """This matrix (out, in) in a tensor of the parameter's shape; a view, or a copy where rows are an index."""
        w = stored if self.expert is None else stored[self.expert]
        w = w.T if self.transposed else w
        return w if self.rows is None else w[self.rows]

    def weight(self, module: nn.Module) -> torch.Tensor:
        """The matrix as it stands in its module now; a quantised one is decoded."""
        return self.of(plain_weight(module, self.param))


def plain_weight(module: nn.Module, param: str = "weight") -> torch.Tensor:
    """A parameter as numbers; a quantised one is decoded (a copy, float32)."""
    w = getattr(module, param)
    if w.is_floating_point():
        return w
    from lora_core.quantised import decode

    return decode(module)


# ---- finding -----------------------------------------------------------------------------------------------------
def weight_shape(module: nn.Module | None) -> tuple[int, int, bool] | None:
    """(out, in, transposed) of a module that multiplies by a matrix, or None: nn.Linear and its kin, and Conv1D."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features, False
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0], True
    return None


def find_sites(model: nn.Module) -> list[Site]:
    """Every matrix of the model that has a logical name, in the order of the layers.

    An architecture that the table does not know is mapped by inspecting its modules' names; `listing` shows what was
    found, and every other matrix can be named by its path in a LoraSpec.
    """
    config = getattr(model, "config", None)
    table = FAMILIES.get(getattr(config, "model_type", ""))
    if table is None:
        return _inspected(model)
    patterns = [(target, pattern(path), order) for target, places in table.items() for path, order in places]
    found: list[Site] = []
    for path, module in model.named_modules():
        shape = weight_shape(module)
        if shape is None:
            continue
        full, in_, transposed = shape
        for target, where, order in patterns:
            hit = where.search(path)
            if hit is None:
                continue
            layout, out = None, full
            if order is not None:
                name, heads, groups = order(config)
                layout = Layout(name, WHICH[target], heads, groups, full)
                out = len(np.arange(full)[layout.rows()])
            key = path if layout is None else f"{path}.{target}"
            found.append(Site(path=path, key=key, target=target, layer=int(hit[1]), out=out, in_=in_, layout=layout,
                              transposed=transposed))  # fmt: skip
    return _sorted(found + _experts(model))


def _sorted(sites: list[Site]) -> list[Site]:
    return sorted(sites, key=lambda s: (s.layer or 0, TARGETS.index(s.target)))


def _experts(model: nn.Module) -> list[Site]:
    """The experts' matrices: slices of parameters (experts, out, in) of modules that say how they are laid out."""
    found = []
    for path, module in model.named_modules():
        for param, targets in (("gate_up_proj", ("gate", "up")), ("up_proj", ("up",)), ("down_proj", ("down",))):
            w = module._parameters.get(param)
            layer = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
            if w is None or w.ndim != 3 or layer is None:
                continue
            turned = bool(getattr(module, "is_transposed", False))
            full, in_ = (w.shape[2], w.shape[1]) if turned else (w.shape[1], w.shape[2])
            order = "halves" if getattr(module, "is_concatenated", True) else "alternate"
            for e in range(w.shape[0]):
                for target in targets:
                    layout = Layout(order, WHICH[target], 0, 0, full) if len(targets) == 2 else None
                    key = f"{path}.{param}.{e}" + (f".{target}" if layout else "")
                    found.append(Site(path=path, key=key, target=target, layer=int(layer[1]), in_=in_, layout=layout,
                                      out=full // len(targets), transposed=turned, param=param, expert=e))  # fmt: skip
    return found


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
    for name in spec.full:
        if name == "head" and base is model:
            raise UserError(f"{type(model).__name__} is a bare body without a head; name modules to train in full")
        if name != "head" and name not in named:
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
            if why:
                used.update(why)
                hits.setdefault(id(p), []).append((path, name))
    for name in (*(t for t in DIRECT if t in spec.targets), *spec.full):
        if name not in used:
            where = "" if spec.layers == "all" or name in spec.full else f", layers {', '.join(map(str, spec.layers))}"
            raise UserError(f"{name!r} hits nothing in {type(model).__name__}{where}")
    return {f"{places[0][0]}.{places[0][1]}": places for places in hits.values()}


def _is(target: str, module: nn.Module, name: str) -> bool:
    return name == "bias" if target == "bias" else "norm" in type(module).__name__.lower() or isinstance(
        module, nn.LayerNorm)  # fmt: skip


def _inspected(model: nn.Module) -> list[Site]:
    targets = inspect([p for p, m in model.named_modules() if weight_shape(m) and ".lora." not in p])
    found = []
    for path, target in targets.items():
        shape = weight_shape(model.get_submodule(path))
        layer = re.search(r"(?:^|\.)(\d+)\.", path)
        assert shape is not None and layer is not None
        out, in_, transposed = shape
        found.append(
            Site(path=path, key=path, target=target, layer=int(layer[1]), out=out, in_=in_, transposed=transposed)
        )
    return _sorted(found + _experts(model))


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
                raise UserError(f"target {target!r} hits nothing in layers {', '.join(map(str, spec.layers))}")
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


def layer_shapes(model: nn.Module) -> dict[str, object]:
    """One layer as a drawing wants it: {layers, matrices: [{name, title, out, in, stage, modules}]}.

    modules is the number of matrices in the whole model that the name hits. Stage: 0 attention input,
    1 attention output, 2 MLP input, 3 MLP output.
    """
    sites = find_sites(model)
    matrices = []
    for name in dict.fromkeys(s.target for s in sites):
        hits = [s for s in sites if s.target == name]
        matrices.append({"name": name, "title": TITLES[name], "out": hits[0].out, "in": hits[0].in_,
                         "stage": STAGES[name], "modules": len(hits)})  # fmt: skip
    return {"layers": len({s.layer for s in sites}), "matrices": matrices}
