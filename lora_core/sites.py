"""Where the matrices are: logical names (q k v o gate up down) -> Site (module, rows, orientation).

Transformers name and fuse their matrices differently in every family. One small table per family says where each
logical matrix lives; the rest of the library sees only Sites. A fused module (GPT-2's c_attn, GPT-NeoX's
query_key_value) holds q, k and v as *rows* of one weight; those rows need not be contiguous: in GPT-NeoX they are
interleaved by head, so a Site carries an index, and a plain slice is the fast case.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_core.errors import UserError, nearest, unknown
from lora_core.families import FAMILIES, STAGES, TARGETS, TITLES, Layout, guess, inspect, pattern
from lora_core.spec import LoraSpec

Rows = slice | torch.Tensor | None  # None: all rows of the weight
WHICH = {"q": 0, "k": 1, "v": 2, "gate": 0, "up": 1}  # place among the matrices of a fused weight


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """One matrix W0 (out, in) of a model: `rows` of the weight of the module at `path`.

    path        module path, as in model.get_submodule(path)
    key         path, or path + ".q" where the matrix is a slice of a fused module: unique in a model
    target      logical name (q k v o gate up down), or the path's last part for a module named by its path
    layer       index of the layer, or None outside the layers
    out, in_    sides of the matrix
    layout      which rows of a fused weight it is; None for a weight of its own
    transposed  the weight is stored (in, out), as transformers' Conv1D does; rows are then its columns
    """

    path: str
    key: str
    target: str
    layer: int | None
    out: int
    in_: int
    layout: Layout | None = None
    transposed: bool = False

    @property
    def rows(self) -> Rows:
        """Which rows of the weight it is: None for all, a slice, or an index (out,)."""
        rows = None if self.layout is None else self.layout.rows()
        return torch.from_numpy(rows) if isinstance(rows, np.ndarray) else rows

    @property
    def full(self) -> int:
        """Rows of the whole weight that the matrix is a part of."""
        return self.out if self.layout is None else self.layout.full

    def weight(self, module: nn.Module) -> torch.Tensor:
        """W0 (out, in) of this site out of its module; a view where rows are None or a slice, else a copy."""
        w = module.weight
        assert isinstance(w, torch.Tensor)
        w = w.T if self.transposed else w
        return w if self.rows is None else w[self.rows]


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
    found.sort(key=lambda s: (s.layer or 0, TARGETS.index(s.target)))
    return found


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
    return sorted(found, key=lambda s: (s.layer or 0, TARGETS.index(s.target)))


def listing(model: nn.Module, spec: LoraSpec | None = None) -> str:
    """A dry run, as a table: what a spec would adapt, or without one every matrix by its name, and what has no name."""
    sites = select(model, spec) if spec else find_sites(model)
    lines = [
        f"{s.target:6} layer {'-' if s.layer is None else s.layer:>3}  {s.out:>6} × {s.in_:<6} {s.key}" for s in sites
    ]
    if spec is None:
        named = {s.path for s in sites}
        rest = [p for p, m in model.named_modules() if weight_shape(m) and p not in named and ".lora." not in p]
        lines += [f"{'-':6} by its path alone            {p}" for p in rest]
    return "\n".join(lines)


def path_site(model: nn.Module, path: str) -> Site:
    """The whole matrix of the module at a path, whatever it is called. UserError when there is none."""
    modules = dict(model.named_modules())
    module = modules.get(path)
    shape = weight_shape(module)
    if shape is None:
        paths = [p for p, m in modules.items() if weight_shape(m) is not None and ".lora." not in p]
        raise unknown("module", path, paths, f"in {type(model).__name__}")
    target, layer = guess(path)
    return Site(path=path, key=path, target=target, layer=layer, out=shape[0], in_=shape[1], transposed=shape[2])


def select(model: nn.Module, spec: LoraSpec) -> list[Site]:
    """The sites that a spec hits, in the order of the layers.

    Raises UserError for a target or a layer that hits nothing, and for a rank above the smaller side of a matrix.
    """
    sites = find_sites(model)
    names = list(dict.fromkeys(s.target for s in sites))
    layers = sorted({s.layer for s in sites if s.layer is not None})
    by_key = {s.key: s for s in sites}
    chosen: dict[str, Site] = {}
    for target in spec.targets:
        if target in names:
            hits = [s for s in sites if s.target == target]
        elif target in by_key:
            hits = [by_key[target]]
        elif target not in TARGETS and "." in target:
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
        rank = spec.rank_of(s.key, s.path, s.target)
        if rank > min(s.out, s.in_):
            raise UserError(f"rank {rank} is above the smaller side of {s.key} ({s.out}×{s.in_}); "
                            f"the largest rank possible there is {min(s.out, s.in_)}")  # fmt: skip
    order = {s.key: i for i, s in enumerate(sites)}
    return sorted(chosen.values(), key=lambda s: order.get(s.key, len(order)))


def _check_patterns(spec: LoraSpec, sites: Iterable[Site]) -> None:
    names = {n for s in sites for n in (s.key, s.path, s.target)}
    for what in ("rank_pattern", "alpha_pattern"):
        for name in dict(getattr(spec, what)):
            if name not in names:
                raise unknown(f"{what} name", name, sorted(names))


def _no_matrix(model: nn.Module, target: str, names: list[str]) -> str:
    near = nearest(target, names)
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
