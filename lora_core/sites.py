"""Where the matrices are: logical names (q k v o gate up down) -> Site (module, rows, orientation).

Transformers name and fuse their matrices differently in every family. One small table per family says where each
logical matrix lives; the rest of the library sees only Sites. A fused module (GPT-2's c_attn, GPT-NeoX's
query_key_value) holds q, k and v as *rows* of one weight; those rows need not be contiguous: in GPT-NeoX they are
interleaved by head, so a Site carries an index, and a plain slice is the fast case.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_core.errors import UserError, unknown
from lora_core.spec import LoraSpec

Rows = slice | torch.Tensor | None  # None: all rows of the weight
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
TITLES = {"q": "query", "k": "key", "v": "value", "o": "attention output", "gate": "MLP gate", "up": "MLP up",
          "down": "MLP down"}  # fmt: skip
STAGES = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 2, "up": 2, "down": 3}


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """One matrix W0 (out, in) of a model: `rows` of the weight of the module at `path`.

    path        module path, as in model.get_submodule(path)
    key         path, or path + ".q" where the matrix is a slice of a fused module: unique in a model
    target      logical name (q k v o gate up down), or the path's last part for a module named by its path
    layer       index of the layer, or None outside the layers
    out, in_    sides of the matrix
    rows        which rows of the weight it is: None for all, a slice, or an index (out,)
    transposed  the weight is stored (in, out), as transformers' Conv1D does; rows are then its columns
    """

    path: str
    key: str
    target: str
    layer: int | None
    out: int
    in_: int
    rows: Rows = None
    transposed: bool = False

    def weight(self, module: nn.Module) -> torch.Tensor:
        """W0 (out, in) of this site out of its module; a view where rows are None or a slice, else a copy."""
        w = module.weight
        assert isinstance(w, torch.Tensor)
        w = w.T if self.transposed else w
        return w if self.rows is None else w[self.rows]


# ---- the table -------------------------------------------------------------------------------------------------
# family -> {target: (path below the model, layout)}; {i} is the layer. A layout, where there is one, picks the rows.
_ATTN = {t: (f"layers.{{i}}.self_attn.{t}_proj", None) for t in "qkvo"}
_LLAMA = _ATTN | {t: (f"layers.{{i}}.mlp.{t}_proj", None) for t in ("gate", "up", "down")}
_OPT = _ATTN | {"o": ("layers.{i}.self_attn.out_proj", None), "up": ("layers.{i}.fc1", None),
                "down": ("layers.{i}.fc2", None)}  # fmt: skip
_GPT2 = {t: ("h.{i}.attn.c_attn", "concat") for t in "qkv"} | {
    "o": ("h.{i}.attn.c_proj", None), "up": ("h.{i}.mlp.c_fc", None), "down": ("h.{i}.mlp.c_proj", None)}  # fmt: skip
_NEOX = {t: ("layers.{i}.attention.query_key_value", "per-head") for t in "qkv"} | {
    "o": ("layers.{i}.attention.dense", None), "up": ("layers.{i}.mlp.dense_h_to_4h", None),
    "down": ("layers.{i}.mlp.dense_4h_to_h", None)}  # fmt: skip
_BERT = {t: (f"encoder.layer.{{i}}.attention.self.{n}", None) for t, n in zip("qkv", ("query", "key", "value"))} | {
    "o": ("encoder.layer.{i}.attention.output.dense", None), "up": ("encoder.layer.{i}.intermediate.dense", None),
    "down": ("encoder.layer.{i}.output.dense", None)}  # fmt: skip
FAMILIES: dict[str, dict[str, tuple[str, str | None]]] = {
    "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gemma": _LLAMA, "gemma2": _LLAMA,
    "gemma3_text": _LLAMA, "olmo": _LLAMA, "olmo2": _LLAMA, "cohere": _LLAMA, "granite": _LLAMA, "stablelm": _LLAMA,
    "opt": _OPT, "gpt2": _GPT2, "gpt_neox": _NEOX, "bert": _BERT, "roberta": _BERT, "electra": _BERT,
}  # fmt: skip


def _concat(config: object, out: int, which: int) -> Rows:
    """q, k, v one after the other, each out/3 rows."""
    n = out // 3
    return slice(which * n, (which + 1) * n)


def _per_head(config: object, out: int, which: int) -> Rows:
    """Rows as (head, 3, head_dim): q, k and v of the first head, then of the second, …"""
    heads = int(getattr(config, "num_attention_heads"))  # noqa: B009  (a config is duck-typed)
    return torch.arange(out).view(heads, 3, out // (3 * heads))[:, which].reshape(-1)


LAYOUTS: dict[str, Callable[[object, int, int], Rows]] = {"concat": _concat, "per-head": _per_head}


# ---- finding -----------------------------------------------------------------------------------------------------
@dataclass
class _Weight:
    out: int
    in_: int
    transposed: bool = field(default=False)


def weight_shape(module: nn.Module) -> _Weight | None:
    """(out, in) of a module that multiplies by a matrix, or None: nn.Linear and its kin, and Conv1D."""
    if isinstance(module, nn.Linear):
        return _Weight(module.out_features, module.in_features)
    if isinstance(module, Conv1D):
        return _Weight(module.weight.shape[1], module.weight.shape[0], True)
    return None


def find_sites(model: nn.Module) -> list[Site]:
    """Every matrix of the model that has a logical name, in the order of the layers.

    An architecture that the table does not know has none; its modules can still be named by their path in a LoraSpec.
    """
    config = getattr(model, "config", None)
    table = FAMILIES.get(getattr(config, "model_type", ""), {})
    found: list[Site] = []
    by_path: dict[str, list[str]] = {}
    for target, (path, _) in table.items():
        by_path.setdefault(path, []).append(target)
    patterns = [(re.compile(r"(?:^|\.)" + re.escape(p).replace(r"\{i\}", r"(\d+)") + "$"), ts) for p, ts in by_path.items()]
    for path, module in model.named_modules():
        shape = weight_shape(module)
        if shape is None:
            continue
        for pattern, targets in patterns:
            hit = pattern.search(path)
            if hit is None:
                continue
            for target in targets:
                layout = table[target][1]
                rows = LAYOUTS[layout](config, shape.out, "qkv".index(target)) if layout else None
                found.append(Site(
                    path=path, key=path if rows is None else f"{path}.{target}", target=target, layer=int(hit[1]),
                    out=shape.out if rows is None else len(range(shape.out)[rows]) if isinstance(rows, slice) else len(rows),
                    in_=shape.in_, rows=rows, transposed=shape.transposed))  # fmt: skip
    found.sort(key=lambda s: (s.layer or 0, TARGETS.index(s.target)))
    return found


def path_site(model: nn.Module, path: str) -> Site:
    """The whole matrix of the module at a path, whatever it is called. UserError when there is none."""
    modules = dict(model.named_modules())
    module = modules.get(path)
    shape = weight_shape(module) if module is not None else None
    if shape is None:
        paths = [p for p, m in modules.items() if weight_shape(m) is not None and ".lora." not in p]
        raise unknown("module", path, paths, type(model).__name__)
    layer = re.search(r"\.(\d+)\.", path)
    return Site(path=path, key=path, target=path.rsplit(".", 1)[-1], layer=int(layer[1]) if layer else None,
                out=shape.out, in_=shape.in_, transposed=shape.transposed)  # fmt: skip


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
        for name, _ in getattr(spec, what):
            if name not in names:
                raise unknown(f"{what} name", name, sorted(names))


def _no_matrix(model: nn.Module, target: str, names: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(target, names, 1, 0.3) or [n for n in names if target.startswith(n)][:1]
    if not names:
        return (f"no matrix {target!r}: {type(model).__name__} is an architecture without named matrices here; "
                "give module paths instead, such as those that model.named_modules() lists")  # fmt: skip
    hint = f" (did you mean {near[0]!r}?)" if near else ""
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
