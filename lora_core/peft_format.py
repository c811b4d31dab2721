"""PEFT's directory format, read strictly and with numpy alone: its config, its tensors, and which of them are whose.

What a file holds, under the name `base_model.model.<module>`:
  .lora_A.weight (r, in), .lora_B.weight (out, r)         ΔW = s·B·A of a matrix
  .lora_embedding_A (r, vocabulary), .lora_embedding_B    the same of an embedding, whose matrix is (d, vocabulary)
  .lora_magnitude_vector (out,)                           DoRA's m
  .base_layer.lora_A.weight …                             of a parameter (target_parameters), such as the experts': A is
      (experts·r, in) and B (out, r·experts), expert by expert in A's rows, direction by direction in B's columns. Where
      two parameters of one module are adapted, the one that the module has first is the deeper in base_layers.
  .<name>, .base_layer.bias                               a parameter trained itself (modules_to_save, bias)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from lora_core.errors import UserError, is_real
from lora_core.patterns import Names
from lora_core.weights import MAX_HEADER, header_length

CONFIG, WEIGHTS, LAB = "adapter_config.json", "adapter_model.safetensors", "lora_lab.json"
PREFIX = "base_model.model."
OURS = "LORA_LAB"  # peft_type of an adapter that PEFT has no words for: it refuses the name, and so reads nothing wrong
NO_TARGET = "dummy-target-modules"  # PEFT's word for an adapter without factors
MAX_JSON, MAX_WEIGHTS = 1 << 20, 8 << 30  # bytes
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
EXPERTS = ("gate_up_proj", "up_proj", "down_proj")  # the parameters of experts, in the order in which modules have them
# What PEFT can say and this library does not do: anything but the value here is refused by its name.
PLAIN: dict[str, tuple[Any, ...]] = {
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # the others change the base model
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The update of one matrix as it is stored: ΔW = scaling·B·A with A (r, in), B (out, r); m (out,) is DoRA's.

    lookup: of an embedding. param: the parameter, and expert: which of its first axis.
    """

    path: str
    A: np.ndarray
    B: np.ndarray
    alpha: float
    scaling: float
    m: np.ndarray | None = None
    lookup: bool = False
    param: str = "weight"
    expert: int | None = None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """All that a file holds.

    units   {key: Unit}; the key is the module's path, for an expert with its parameter and number
    copies  {"path.parameter": value} of what was trained itself
    base    {"path.parameter": value} of the base model's own weights, which PEFT writes beside embeddings' factors
    """

    units: dict[str, Unit] = field(default_factory=dict)
    copies: dict[str, np.ndarray] = field(default_factory=dict)
    base: dict[str, np.ndarray] = field(default_factory=dict)


def unit_key(path: str, param: str, expert: int | None) -> str:
    return path if expert is None else f"{path}.{param}.{expert}"


# ---- files -------------------------------------------------------------------------------------------------------
def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most MAX_JSON bytes."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}, so it is no adapter in PEFT's format")
    if path.stat().st_size > MAX_JSON:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes; at most {MAX_JSON:,} are read")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON: {str(e).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def check_config(folder: Path, config: Mapping[str, Any], ours: bool) -> None:
    """Refuse by its name what this library cannot apply, and values that are nothing. ours: LAB is there too."""
    kind = config.get("peft_type")
    if kind != "LORA" and not (kind == OURS and ours):
        raise UserError(f"{folder} is a {kind} adapter by its {CONFIG}; this library reads LORA")
    for name, plain in PLAIN.items():
        if config.get(name) not in plain:
            raise UserError(f"{folder} uses PEFT's {name} = {config[name]!r}, which this library cannot apply")
    if config.get("bias") not in ("none", "all", "lora_only", None):
        raise UserError(f"{folder / CONFIG}: bias is {config['bias']!r}; PEFT has none, all and lora_only")
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if not is_real(value, 0) or value == 0:
            raise UserError(f"{folder / CONFIG}: {name} is {value!r}, not a positive number")
    value = config.get("lora_dropout") or 0.0
    if not is_real(value, 0) or value >= 1:
        raise UserError(f"{folder / CONFIG}: lora_dropout is {repr(value)[:80]}, not a number from 0 to below 1")
    for name in ("rank_pattern", "alpha_pattern"):
        values = config.get(name) or {}
        if not isinstance(values, dict) or not all(is_real(v, 0) and v for v in values.values()):
            raise UserError(f"{folder / CONFIG}: {name} must map module names to positive numbers")
    for name in ("modules_to_save", "target_parameters", "target_modules"):
        values = config.get(name) or []
        if name == "target_modules" and isinstance(values, str):
            continue
        if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
            raise UserError(f"{folder / CONFIG}: {name} must be a list of names")


def natural(name: str) -> list[Any]:
    """A key that sorts layer 2 before layer 10."""
    return [(0, int(c), "") if c.isdecimal() else (1, 0, c) for c in re.split(r"(\d{1,9})", name)]


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """{name: array} of a safetensors file, layer by layer; bfloat16 as float32."""
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(8)
        header_length(head, path, size, MAX_HEADER)
        if size > MAX_WEIGHTS:
            raise UserError(f"{path} has {size:,} bytes; at most {MAX_WEIGHTS:,} are read")
        data = head + f.read()
    try:
        raw = safetensors.deserialize(data)
    except (safetensors.SafetensorError, RecursionError) as e:
        raise UserError(f"{path} is no readable safetensors file: {e}") from None
    out = {}
    for name, t in sorted(raw, key=lambda item: natural(item[0])):
        if t["dtype"] == "BF16":  # numpy has no bfloat16: its bits are the upper half of a float32
            value = (np.frombuffer(t["data"], np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif t["dtype"] in DTYPES:
            value = np.frombuffer(t["data"], DTYPES[t["dtype"]])
        else:
            raise UserError(f"{path}: tensor {name!r} is {t['dtype']}; what was trained is F64, F32, F16 or BF16")
        out[name] = value.reshape(t["shape"])
        if not np.isfinite(value).all():
            raise UserError(f"{path}: {name} holds a number that is not finite (NaN or infinity)")
    return out


# ---- which tensors are whose -------------------------------------------------------------------------------------
FACTOR = re.compile(r"(.+?)((?:\.base_layer)*)\.lora_(?:(A|B)\.weight|(embedding_[AB]|magnitude_vector))")


def parse(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], also: Collection[str]) -> Parts:
    """Every tensor put where it belongs; also: names of copies beyond those that the config speaks of."""
    file, parts, saved = folder / WEIGHTS, Parts(), config.get("modules_to_save") or []
    found: dict[str, dict[int, dict[str, np.ndarray]]] = {}  # module: depth in base_layers: part
    for name, value in tensors.items():
        rest = name.removeprefix(PREFIX)
        factor = FACTOR.fullmatch(rest)
        if factor and rest != name:
            depth = factor[2].count(".")
            found.setdefault(factor[1], {}).setdefault(depth, {})[factor[3] or factor[4]] = value
            continue
        path, _, param = rest.rpartition(".")
        wrapped = path.endswith(".base_layer")
        path = path.removesuffix(".base_layer")
        bias = param == "bias" and config.get("bias") not in ("none", None)
        if rest == name or not path:
            raise UserError(f"{file}: unknown tensor {name!r}; expected {PREFIX}<module>.lora_A.weight and the like")
        if bias and re.search(r"\.(original_module|modules_to_save)$", path):
            continue  # written by PEFT beside the copy that it uses
        whole = f"{path}.{param}"
        if wrapped and not bias and whole not in also:
            parts.base[whole] = value
        elif bias or whole in also or is_saved(path, saved) or (config.get("ensure_weight_tying") and saved and any(
                np.array_equal(value, v) for n, v in tensors.items() if n != name)):  # fmt: skip
            parts.copies[whole] = value
        else:
            raise UserError(f"{file}: unknown tensor {name!r}: neither factors nor what {CONFIG} says is saved whole")
    names = Names(folder / CONFIG, config)
    for path, levels in found.items():
        for param, pieces in _named(folder, config, names, path, levels).items():
            _add(parts.units, folder, config, names, path, param, pieces)
    if not parts.units and not parts.copies:
        raise UserError(f"{file} holds no factors")
    for name in parts.base:
        if name.rpartition(".")[0] not in parts.units:
            raise UserError(f"{file}: unknown tensor {name!r}: a base weight of a module without factors")
    return parts


def is_saved(path: str, names: Iterable[str]) -> bool:
    """PEFT's rule: a module is saved whole when its path, or that of one around it, ends with one of the names."""
    ends = [i for i, c in enumerate(path) if c == "."] + [len(path)]
    return any(path[:i].endswith(n) for i in ends for n in names)


def _named(folder: Path, config: Mapping[str, Any], known: Names, path: str, levels: dict[int, Any]) -> dict[str, Any]:
    """{parameter: its pieces}, the deepest first; "weight" of a module that PEFT targets as one."""
    module, names = known.target(path), []
    for t in config.get("target_parameters") or []:
        param = t.rpartition(".")[2]
        if f"{path}.{param}" == t or f"{path}.{param}".endswith(f".{t}"):
            names.append(param)
    names = ["weight"] if module and list(levels) == [0] else sorted(
        dict.fromkeys(names), key=lambda n: EXPERTS.index(n) if n in EXPERTS else -1) or ["weight"]  # fmt: skip
    if len(names) > 1 and not set(names) <= set(EXPERTS):
        raise UserError(f"{folder} adapts {' and '.join(names)} of {path}, and does not say which factors are whose")
    if sorted(levels) != list(range(len(names))):
        raise UserError(f"{folder / WEIGHTS}: {path} has factors at {len(levels)} levels, where {CONFIG} names {names}")
    return dict(zip(names, (levels[d] for d in sorted(levels, reverse=True)), strict=True))


def _add(units: dict[str, Unit], folder: Path, config: Mapping[str, Any], known: Names, path: str, param: str,
         pieces: Mapping[str, np.ndarray]) -> None:  # fmt: skip
    """The Unit, or those of all experts, from the tensors of one matrix; every shape checked."""
    file, dora = folder / WEIGHTS, bool(config.get("use_dora"))
    lookup = "embedding_A" in pieces or "embedding_B" in pieces
    wanted = {"A": "lora_embedding_A", "B": "lora_embedding_B"} if lookup else {"A": "lora_A", "B": "lora_B"}
    got = {part: pieces.get(f"embedding_{part}" if lookup else part) for part in "AB"}
    if lookup and dora:
        raise UserError(f"{folder} uses PEFT's use_dora on the embedding {path}, which this library cannot apply")
    if dora:
        wanted["m"], got["m"] = "lora_magnitude_vector", pieces.get("magnitude_vector")
    for part, name in wanted.items():
        value = got[part]
        if value is None:
            raise UserError(f"{file}: {PREFIX}{path}.{name}{'' if lookup or part == 'm' else '.weight'} is missing")
        if value.ndim != (1 if part == "m" else 2) or 0 in value.shape:
            shape = "vector" if part == "m" else "matrix"
            raise UserError(f"{file}: {name} of {path} has shape {value.shape}; it must be a {shape}")
    if len(pieces) != len(got):
        raise UserError(f"{file}: unknown tensors of {path}: {', '.join(sorted(pieces))} do not belong together")
    A, B, m = got["A"], got["B"], got.get("m")
    assert A is not None and B is not None
    name = path if param == "weight" and not as_parameter(config, path) else f"{path}.{param}"
    r, alpha = known.value("rank", name), float(known.value("alpha", name))
    scaling = alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r
    experts = 1 if param == "weight" else max(1, int(A.shape[0] // r))
    if A.shape[0] != r * experts or B.shape[1] != r * experts or (m is not None and len(m) != B.shape[0]):
        raise UserError(
            f"{file}: {path} has A {A.shape} and B {B.shape}{'' if m is None else f' and a magnitude {m.shape}'}; by"
            f" {CONFIG} its rank is {r}, so A must be ({r}, in) and B (out, {r})"
        )
    for e in range(experts):
        expert = None if param == "weight" else e
        units[unit_key(path, param, expert)] = Unit(
            path=path, A=A.reshape(experts, -1, A.shape[1])[e], B=B.reshape(B.shape[0], -1, experts)[:, :, e], m=m,
            alpha=alpha, scaling=scaling, lookup=lookup, param=param, expert=expert)  # fmt: skip


def as_parameter(config: Mapping[str, Any], path: str) -> bool:
    """Whether PEFT targets this matrix as the parameter `weight`, under which name it then looks up its patterns."""
    name = f"{path}.weight"
    return any(name == t or name.endswith(f".{t}") for t in config.get("target_parameters") or [])

