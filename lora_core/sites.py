"""Where the matrices are: logical names (q k v o gate up down embed head) -> Site (module, rows, orientation).

Transformers name and fuse their matrices differently in every family. One small table per family says where each
logical matrix lives; the rest of the library sees only Sites. A fused module (GPT-2's c_attn, GPT-NeoX's
query_key_value) holds q, k and v as *rows* of one weight; those rows need not be contiguous: in GPT-NeoX they are
interleaved by head, so a Site carries an index, and a plain slice is the fast case. The experts of a mixture are no
modules at all, but slices of one parameter (experts, out, in): a Site then names the parameter and the expert.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_core.families import FAMILIES, STAGES, TARGETS, TITLES, Layout, inspect, pattern

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


def layer_shapes(model: nn.Module) -> dict[str, object]:
    """One layer as a drawing wants it: {layers, matrices: [{name, title, out, in, stage, modules, by_layer, also}]}.

    modules is the number of matrices in the whole model that the name hits, by_layer those in each layer. also: the
    name that this one stands for too, {"name": "v", "layers": […]} where k is also v, or None. Stage: 0 attention
    input, 1 attention output, 2 MLP input, 3 MLP output.
    """
    sites = find_sites(model)
    layers = sorted({s.layer for s in sites if s.layer is not None})
    twice = key_is_value(sites)
    matrices = []
    for name in dict.fromkeys(s.target for s in sites):
        hits = [s for s in sites if s.target == name]
        matrices.append({"name": name, "title": TITLES[name], "out": hits[0].out, "in": hits[0].in_,
                         "stage": STAGES[name], "modules": len(hits),
                         "by_layer": [sum(s.layer == layer for s in hits) for layer in layers],
                         "also": {"name": "v", "layers": twice} if name == "k" and twice else None})  # fmt: skip
    return {"layers": len(layers), "matrices": matrices}


def key_is_value(sites: list[Site]) -> list[int]:
    """The layers where one matrix makes keys and values: they have a q and a k, and no v."""
    have: dict[int, set[str]] = {}
    for s in sites:
        if s.layer is not None:
            have.setdefault(s.layer, set()).add(s.target)
    return [layer for layer, names in sorted(have.items()) if {"q", "k"} <= names and "v" not in names]
