"""Adapters on disk: PEFT's directory format, read and checked strictly. Safetensors only, never pickle.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, which PEFT reads, and `lora_lab.json`, which adds
what PEFT has no words for: which slice of a fused module a matrix is, and where the adapter comes from. Slices of one
fused module (GPT-2's q and v in c_attn) are written as one equivalent adapter of the whole module: their A's stacked,
their B's as blocks on their own rows. Reading needs numpy alone; only attaching to a model needs torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors

from lora_core.errors import UserError
from lora_core.families import Layout, guess
from lora_core.spec import LoraSpec

if TYPE_CHECKING:
    from torch import nn

    from lora_core.adapter import Adapter

CONFIG, WEIGHTS, LAB = "adapter_config.json", "adapter_model.safetensors", "lora_lab.json"
PREFIX = "base_model.model."
MAX_JSON, MAX_HEADER, MAX_WEIGHTS = 4 << 20, 4 << 20, 8 << 30  # bytes
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
Factors = tuple[np.ndarray, np.ndarray, float]  # A (r, in), B (out, r), scaling
# What PEFT can say and this library does not do: anything but the value here is refused by its name.
PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
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
class StoredSite:
    """One matrix of a stored adapter: where it belongs, and ΔW = scaling·B·A with A (r, in) and B (out, r)."""

    key: str
    path: str
    target: str
    layer: int | None
    layout: Layout | None
    A: np.ndarray
    B: np.ndarray
    scaling: float


@dataclass(frozen=True, kw_only=True)
class Stored:
    """An adapter read from a folder, without its model.

    spec is None for an adapter that this library did not write; info is what was saved beside it.
    """

    folder: Path
    config: dict[str, Any]
    sites: dict[str, StoredSite]
    spec: LoraSpec | None = None
    info: dict[str, Any] = field(default_factory=dict)
    fresh: bool = False

    @property
    def base(self) -> str | None:
        """The base model as the adapter names it: a registry name, a folder or a hub id."""
        return self.info.get("model") or self.config.get("base_model_name_or_path")


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
    config = _read_json(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
        if pickles:
            raise UserError(
                f"{folder / pickles[0]} is a pickle, which can run code when opened; save the adapter as {WEIGHTS}"
            )
        raise UserError(f"{folder} has no {WEIGHTS}")
    _check_config(folder, config)
    tensors = _read_tensors(folder / WEIGHTS)
    whole = _pair(folder, config, tensors)
    lab = _read_json(folder / LAB) if (folder / LAB).exists() else {}
    if not lab:
        sites = {}
        for path, (A, B, s) in whole.items():
            target, layer = guess(path)
            sites[path] = StoredSite(key=path, path=path, target=target, layer=layer, layout=None, A=A, B=B, scaling=s)
        return Stored(folder=folder, config=config, sites=sites)
    try:
        spec = LoraSpec.from_dict(lab["spec"])
        sites = _split(whole, lab["sites"])
        return Stored(
            folder=folder,
            config=config,
            sites=sites,
            spec=spec,
            info=dict(lab.get("info", {})),
            fresh=bool(lab.get("fresh", False)),
        )
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError) as e:
        raise UserError(
            f"{folder / LAB} does not fit {WEIGHTS} ({e}); without it the folder reads as a plain PEFT adapter"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
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


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{folder} is a {kind} adapter by its {CONFIG}; this library reads LORA")
    for name, plain in PLAIN.items():
        if config.get(name) not in plain:
            raise UserError(f"{folder} uses PEFT's {name} = {config[name]!r}, which this library cannot apply")
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise UserError(f"{folder / CONFIG}: {name} is {value!r}, not a positive number")
    for name in ("rank_pattern", "alpha_pattern"):
        values = config.get(name) or {}
        if not isinstance(values, dict) or not all(
            isinstance(v, (int, float)) and 0 < v < math.inf for v in values.values()
        ):
            raise UserError(f"{folder / CONFIG}: {name} must map module names to positive numbers")


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(MAX_HEADER, size - 8):
            raise UserError(f"{path} is no safetensors file: its header claims {length:,} bytes of {size:,}")
        if size > MAX_WEIGHTS:
            raise UserError(f"{path} has {size:,} bytes; at most {MAX_WEIGHTS:,} are read")
        data = head + f.read()
    try:
        raw = safetensors.deserialize(data)
    except (safetensors.SafetensorError, RecursionError) as e:
        raise UserError(f"{path} is no readable safetensors file: {e}") from None
    out = {}
    for name, t in raw:
        if t["dtype"] == "BF16":  # numpy has no bfloat16: its bits are the upper half of a float32
            value = (np.frombuffer(t["data"], np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif t["dtype"] in DTYPES:
            value = np.frombuffer(t["data"], DTYPES[t["dtype"]])
        else:
            raise UserError(f"{path}: tensor {name!r} is {t['dtype']}; factors are F64, F32, F16 or BF16")
        out[name] = value.reshape(t["shape"])
    return out


def _pair(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Factors]:
    """{module path: (A, B, scaling)}; every tensor used, every shape and number checked."""
    file = folder / WEIGHTS
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        path, dot, part = name.removesuffix(".weight").rpartition(".lora_")
        if not dot or part not in ("A", "B") or not name.startswith(PREFIX) or not name.endswith(".weight"):
            raise UserError(
                f"{file}: unknown tensor {name!r}; expected {PREFIX}<module>.lora_A.weight and .lora_B.weight"
            )
        found.setdefault(path.removeprefix(PREFIX), {})[part] = value
    if not found:
        raise UserError(f"{file} holds no factors")
    out = {}
    for path, pair in found.items():
        for part in "AB":
            if part not in pair:
                raise UserError(f"{file}: {PREFIX}{path}.lora_{part}.weight is missing")
            if pair[part].ndim != 2 or 0 in pair[part].shape:
                raise UserError(f"{file}: lora_{part} of {path} has shape {pair[part].shape}; it must be a matrix")
            if not np.isfinite(pair[part]).all():
                raise UserError(f"{file}: lora_{part} of {path} holds a number that is not finite (NaN or infinity)")
        A, B = pair["A"], pair["B"]
        r = _lookup(config.get("rank_pattern"), path, config["r"])
        if A.shape[0] != r or B.shape[1] != r:
            raise UserError(
                f"{file}: {path} has A {A.shape} and B {B.shape}; by {CONFIG} its rank is {r},"
                f" so A must be ({r}, in) and B (out, {r})"
            )
        alpha = _lookup(config.get("alpha_pattern"), path, config["lora_alpha"])
        out[path] = (A, B, alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r)
    return out


def _lookup(patterns: Mapping[str, float] | None, path: str, default: float) -> float:
    """PEFT's rule: the first pattern that is the path or a dotted end of it; a leading ^ means the whole path."""
    for name, value in (patterns or {}).items():
        if path == name.removeprefix("^") or (not name.startswith("^") and path.endswith("." + name)):
            return value
    return default


def _split(whole: Mapping[str, Factors], sites: list[dict[str, Any]]) -> dict[str, StoredSite]:
    """Our matrices out of PEFT's modules: whole ones as they are, slices out of their block."""
    out: dict[str, StoredSite] = {}
    taken: dict[str, int] = {}
    covered = {path: np.zeros(B.shape, bool) for path, (_, B, _) in whole.items()}
    for d in sites:
        A, B, s = whole[d["path"]]
        layout = Layout(*d["layout"]) if d.get("layout") else None
        first = taken.get(d["path"], 0)
        cols = slice(first, first + int(d["rank"]))
        taken[d["path"]] = cols.stop
        if layout is not None and (layout.full != B.shape[0] or not all(isinstance(n, int) for n in layout[1:])):
            raise ValueError(f"the layout of {d['key']} does not fit a weight of {B.shape[0]} rows")
        rows: Any = slice(None) if layout is None else layout.rows()
        covered[d["path"]][rows, cols] = True
        ratio = s / float(d["scaling"])  # 1 unless slices of one module differ in their scaling
        block = B[rows, cols]
        out[d["key"]] = StoredSite(
            key=str(d["key"]),
            path=str(d["path"]),
            target=str(d["target"]),
            layer=d["layer"],
            layout=layout,
            A=A[cols],
            B=block if ratio == 1 else block * ratio,
            scaling=float(d["scaling"]),
        )
        if out[d["key"]].A.shape[0] != int(d["rank"]):
            raise ValueError(f"{d['key']} is said to have rank {d['rank']}")
    for path, (A, B, _) in whole.items():
        if taken.get(path) != A.shape[0] or B[~covered[path]].any():
            raise ValueError(f"the matrices listed for {path} are not all of it")
    return out


def load_into(model: nn.Module, folder: Path, name: str | None, allow_zero: bool) -> Adapter:
    """Attach a stored adapter to a model; `adapter.load_adapter` has the contract."""
    import re

    import torch

    from lora_core.adapter import book_of, put_on
    from lora_core.sites import Site, path_site

    stored = read_adapter(folder)
    if not (allow_zero or stored.fresh) and not any(s.B.any() for s in stored.sites.values()):
        raise UserError(
            f"every B in {folder / WEIGHTS} is zero: the adapter would change nothing."
            " If that is meant, load it with allow_zero=True"
        )
    sites, tensors = [], {}
    for s in stored.sites.values():
        host = path_site(model, s.path)  # says what there is, and the nearest match, where the path is unknown
        site = Site(
            path=s.path,
            key=s.key,
            target=s.target,
            layer=s.layer,
            layout=s.layout,
            in_=host.in_,
            out=s.B.shape[0] if s.layout and s.layout.full == host.out else host.out,
            transposed=host.transposed,
        )
        if (s.B.shape[0], s.A.shape[1]) != (site.out, site.in_):
            raise UserError(
                f"{s.key} in {folder} is {s.B.shape[0]}×{s.A.shape[1]}, but the model's matrix is"
                f" {site.out}×{site.in_}: "
                f"the adapter was made for another model ({stored.base or 'unnamed'})"
            )
        sites.append(site)
        tensors[s.key] = (torch.tensor(s.A), torch.tensor(s.B), s.scaling)
    spec = stored.spec or _foreign_spec(stored)
    if name is None:
        stem = re.sub(r"[^\w-]", "_", folder.resolve().name)[:80] or "adapter"
        taken = book_of(model).adapters
        name = next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)
    adapter = put_on(model, spec, name, sites, tensors)
    adapter.info = dict(stored.info)
    return adapter


def _foreign_spec(stored: Stored) -> LoraSpec:
    """A LoraSpec that describes a PEFT adapter: every module by its path, with its own rank and α."""
    c = stored.config
    ranks = {k: s.A.shape[0] for k, s in stored.sites.items()}
    alphas = {k: float(_lookup(c.get("alpha_pattern"), s.path, c["lora_alpha"])) for k, s in stored.sites.items()}
    return LoraSpec(
        targets=tuple(stored.sites),
        rank=int(c["r"]),
        alpha=float(c["lora_alpha"]),
        scaling="alpha/sqrt(r)" if c.get("use_rslora") else "alpha/r",
        dropout=float(c.get("lora_dropout") or 0.0),
        rank_pattern=tuple((k, r) for k, r in ranks.items() if r != c["r"]),
        alpha_pattern=tuple((k, a) for k, a in alphas.items() if a != c["lora_alpha"]),
    )
