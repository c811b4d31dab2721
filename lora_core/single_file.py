"""LoRA factors out of one safetensors file, by whichever names its trainer gave them. Numpy alone, no config needed.

  PEFT       base_model.model.<module>.lora_A.weight (r, in), .lora_B.weight (out, r)
  diffusers  <part>.<module>.lora_A.weight …, and older: <module>.lora.down.weight, <module>_lora.down.weight,
             <module>.lora_linear_layer.down.weight
  kohya      lora_unet_<module with underscores>.lora_down.weight, .lora_up.weight, .alpha; a convolution's factors
             (r, in, h, w) and (out, r, 1, 1) are those of its matrix (out, in·h·w), with .lora_mid.weight between
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_core.errors import UserError
from lora_core.families import TARGETS, guess
from lora_core.peft_format import PREFIX, natural
from lora_core.stored import Stored, StoredSite
from lora_core.weights import Entry, Header, read_entry

MAX_RANK = 4096
DOWN, UP, MID = "down", "up", "mid"
FACTOR = re.compile(
    r"(?P<module>.+?)"
    r"(?:\.lora_(?P<peft>[AB])(?:\.[\w-]{1,80})?\.weight"
    r"|\.lora_embedding_(?P<lookup>[AB])(?:\.[\w-]{1,80})?"
    r"|\.lora_(?P<kohya>down|up|mid)\.weight"
    r"|(?:\.lora|_lora|\.lora_linear_layer)\.(?P<old>down|up)\.weight"
    r"|\.(?P<beside>alpha|dora_scale)"
    r"|\.lora_(?P<magnitude>magnitude_vector)(?:\.weight|\.[\w-]{1,80}(?:\.weight)?)?)"
)
OTHER = {"hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT", "boft_": "BOFT", "vera_lambda": "VeRA", "ia3_l": "IA³"}
BLOCK = re.compile(r"(.*(?:blocks|layers?|block|resnets|attentions|samplers|[.]h)\.\d+)\.(.+)")


def is_lora(names: Any) -> bool:
    """Whether a file's names are those of LoRA factors, or of something of that kind."""
    return any(_hit(n) or _other(n) for n in names)


def _hit(name: str) -> re.Match[str] | None:
    return FACTOR.fullmatch(name) if len(name) < 500 else None


def _other(name: str) -> str | None:
    return next((kind for sign, kind in OTHER.items() if sign in name), None)


def read_file(path: Path, header: Header) -> tuple[Stored, str, list[str]]:
    """(its factors, "PEFT", "kohya" or "diffusers", remarks) of a file with LoRA's names.

    Without α in the file s = 1 is taken, and a remark says so. Of DoRA, s·B·A. Raises UserError, naming what is
    wrong: a factor without the other, shapes that do not fit, another method's tensors.
    """
    parts, convention, rest = _sorted_out(path, header)
    known = _alphas(header.metadata)
    sites: dict[str, StoredSite] = {}
    remarks: list[str] = []
    unscaled = magnitudes = 0
    for module, pieces in parts.items():
        A, B = _factors(path, module, pieces)
        r = A.shape[0]
        alpha = _alpha(path, module, pieces, known, r)
        unscaled += alpha is None
        magnitudes += "magnitude" in pieces
        key = module.removeprefix(PREFIX).removesuffix(".base_layer")
        lookup = "lookup" in pieces
        target, layer = guess(key)
        sites[key] = StoredSite(key=key, path=key, target=target, layer=layer, A=A, B=B, lookup=lookup,
                                alpha=float(r if alpha is None else alpha[0]),
                                scaling=1.0 if alpha is None else alpha[0] / alpha[1])  # fmt: skip
    if unscaled:
        of = "" if unscaled == len(sites) else f" of {unscaled} of its {len(sites)} matrices"
        remarks.append(f"α{of} is not in the file: s = 1 is taken, so that sizes may be off by a factor; no rank is")
    if magnitudes:
        remarks.append("it is DoRA's: shown is s·B·A, since the rest of its ΔW takes W0 to know")
    if rest:
        remarks.append(f"{len(rest)} of its tensors are no factors, and are left out ({rest[0][:60]}, …)"
                       if len(rest) > 1 else f"{rest[0][:80]} is no factor, and is left out")  # fmt: skip
    return Stored(folder=path, config=_config(header.metadata), sites=_placed(sites)), convention, remarks


def _sorted_out(path: Path, header: Header) -> tuple[dict[str, dict[str, tuple[str, Entry]]], str, list[str]]:
    """({module: {piece: tensor}}, whose names they are, the names that are no factors), in a natural order."""
    parts: dict[str, dict[str, tuple[str, Entry]]] = {}
    kinds: dict[str, int] = {}
    rest = []
    for name in sorted(header.entries, key=natural):
        hit = _hit(name)
        if hit is None:
            if kind := _other(name):
                raise UserError(f"{path} holds {kind} tensors ({name[:80]}); what can be opened here is LoRA")
            rest.append(name)
            continue
        piece = {"A": DOWN, "B": UP}.get(hit["peft"] or hit["lookup"]) or hit["kohya"] or hit["old"]
        piece = piece or ("alpha" if hit["beside"] == "alpha" else "magnitude")
        pieces = parts.setdefault(hit["module"], {})
        if piece in pieces:
            raise UserError(f"{path} has two adapters for {hit['module'][:80]}; one at a time can be opened")
        pieces[piece] = (name, header.entries[name])
        if hit["lookup"]:
            pieces["lookup"] = pieces[piece]
        kind = ("PEFT" if name.startswith(PREFIX) else "diffusers") if hit["peft"] or hit["lookup"] else (
            "kohya" if hit["kohya"] else "diffusers" if hit["old"] else "")  # fmt: skip
        kinds[kind] = kinds.get(kind, 0) + bool(kind)
    for module in [m for m, pieces in parts.items() if not pieces.keys() & {DOWN, UP, MID}]:
        rest += [name for name, _ in parts.pop(module).values()]
    if not parts:
        raise UserError(f"{path} holds no LoRA factors")
    return parts, max(kinds, key=lambda k: kinds[k]), rest


def _factors(path: Path, module: str, pieces: Mapping[str, tuple[str, Entry]]) -> tuple[np.ndarray, np.ndarray]:
    """A (r, in) and B (out, r) of one module."""
    for piece in (DOWN, UP):
        if piece not in pieces:
            raise UserError(f"{path}: {module[:80]} has one factor of two: its {piece} projection is missing")
    shapes = [pieces[p][1].shape for p in (DOWN, UP)]
    words = " and ".join("×".join(map(str, s)) for s in shapes)
    if any(len(s) not in (2, 3, 4, 5) or 0 in s for s in shapes):
        raise UserError(f"{path}: the factors of {module[:80]} are {words}; they must be matrices")
    down, up = (read_entry(*pieces[p]) for p in (DOWN, UP))
    r = down.shape[0]
    A, B = down.reshape(r, -1), up.reshape(up.shape[0], -1)
    if MID in pieces:  # ΔW[o, i, h, w] = Σ up[o, p]·mid[p, q, h, w]·down[q, i]
        mid = read_entry(*pieces[MID])
        if mid.ndim < 3 or mid.shape[:2] != (B.shape[1], r):
            raise UserError(f"{path}: the middle factor of {module[:80]} does not fit the two others")
        A = np.einsum("pqk,qi->pik", mid.reshape(*mid.shape[:2], -1), A).reshape(mid.shape[0], -1)
        r = A.shape[0]
    if B.shape[1] != r:
        raise UserError(f"{path}: the factors of {module[:80]} are {words}; they do not share a rank")
    if r > MAX_RANK:
        raise UserError(f"{path}: {module[:80]} has rank {r:,}; at most {MAX_RANK:,} is read")
    return A, B


def _alpha(path: Path, module: str, pieces: Mapping[str, tuple[str, Entry]], known: Mapping[str, Any],
           r: int) -> tuple[float, float] | None:  # fmt: skip
    """(α, what it is divided by), or None where the file does not say."""
    if "alpha" in pieces:
        name, entry = pieces["alpha"]
        value = _whole(entry) if entry.dtype in ("I64", "I32") else read_entry(name, entry)
        if value.size != 1:
            raise UserError(f"{path}: α of {module[:80]} is {value.shape}; it must be one number")
        return float(value.reshape(())), float(r)
    for part in (f"{module.partition('.')[0]}.", ""):
        if isinstance(alpha := known.get(f"{part}lora_alpha"), (int, float)) and not isinstance(alpha, bool):
            patterns = known.get(f"{part}alpha_pattern") or {}
            own = next((v for p, v in patterns.items() if module.endswith(p)), alpha) if isinstance(
                patterns, dict) else alpha  # fmt: skip
            if isinstance(own, (int, float)) and 0 < own < 1e6:
                return float(own), float(np.sqrt(r) if known.get(f"{part}use_rslora") else r)
    try:
        alpha = float(known["ss_network_alpha"])
        return (alpha, float(r)) if 0 < alpha < 1e6 else None
    except (KeyError, TypeError, ValueError):
        return None


def _whole(entry: Entry) -> np.ndarray:
    kind = {"I64": "<i8", "I32": "<i4"}[entry.dtype]
    return np.fromfile(entry.file, kind, (entry.end - entry.begin) // np.dtype(kind).itemsize, offset=entry.begin)


def _alphas(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the metadata says of scaling: diffusers' lora_adapter_metadata, a PEFT config, kohya's ss_network_alpha."""
    out: dict[str, Any] = {k: v for k, v in metadata.items() if k == "ss_network_alpha"}
    for name in ("lora_adapter_metadata", "adapter_config", "peft_config"):
        try:
            told = json.loads(metadata.get(name, "null"))
        except (ValueError, RecursionError):
            continue
        out |= told if isinstance(told, dict) else {}
    return out


def _config(metadata: Mapping[str, str]) -> dict[str, Any]:
    for name in ("base_model_name_or_path", "ss_base_model", "ss_sd_model_name", "modelspec.architecture"):
        if metadata.get(name):
            return {"base_model_name_or_path": metadata[name][:200]}
    return {}


# ---- places in a map -----------------------------------------------------------------------------------------------
def _placed(sites: dict[str, StoredSite]) -> dict[str, StoredSite]:
    """What no family of language models knows gets the end of its path as its name, and its blocks are counted."""
    places = Counter((s.target, s.layer) for s in sites.values())
    known = {k for k, s in sites.items()
             if s.target in TARGETS and s.layer is not None and places[s.target, s.layer] == 1}  # fmt: skip
    found = {key: _block(key) for key in sites if key not in known}
    several = len({part for part, _, _ in found.values()}) > 1
    counts: Counter[str] = Counter()
    out = {}
    for key, s in sites.items():
        if key in known:
            out[key] = s
            continue
        part, _, tail = found[key]
        name = (f"{part}_{tail}" if several and part else tail)[-40:]
        out[key] = replace(s, target=name, layer=counts[name])
        counts[name] += 1
    return out


def _block(key: str) -> tuple[str, str, str]:
    """(part of the model, block, name within it): ("unet", "down_blocks.0.attentions.1", "attn1_to_q")."""
    kohya = re.match(r"lora_([A-Za-z]+\d*)_(.+)", key)
    part, rest = (kohya[1], re.sub(r"_(\d+)(?=_|$)", r".\1.", kohya[2])) if kohya else ("", key)
    rest = re.sub(r"\.+", ".", rest.replace("._", ".")).strip(".")
    if not kohya:
        first, _, more = rest.partition(".")
        if first in ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "prior"):
            part, rest = first, more
    hit = BLOCK.fullmatch(rest)
    tail = hit[2] if hit else rest
    tail = re.sub(r"\W+", "_", re.sub(r"\.?processor\.?", ".", tail)).strip("_")
    return part, hit[1] if hit else "", tail or "weight"
