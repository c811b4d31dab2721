"""Merging into weights of four or eight bits (bitsandbytes): decode, add ΔW, quantise again, and say what was lost.

Quantising rounds to a few levels, further apart than most of a small ΔW is large: a merge loses part of what was
trained, and how much is measured here. QLoRA (arXiv 2305.14314) therefore leaves the adapter unmerged.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lora_core.errors import UserError

if TYPE_CHECKING:
    from lora_core.merging import Merging


@dataclass(frozen=True, eq=False)
class Bits:
    """A quantised weight put aside: its codes, what belongs to them, and the numbers that they mean."""

    codes: Tensor
    state: Any
    plain: Tensor


def is_quantised(weight: Tensor) -> bool:
    return not weight.is_floating_point()


def decode(module: nn.Module) -> Tensor:
    """The numbers (out, in) that a module's quantised weight stands for, float32. UserError for a kind unknown here."""
    codes, state = _read(module)
    return _decode(codes, state)


def keep(module: nn.Module) -> Bits:
    """All that is needed to put the weight back to the bit."""
    codes, state = _read(module)
    return Bits(codes.clone(), state, _decode(codes, state))


def write(module: nn.Module, bits: Bits, change: Tensor | None) -> None:
    """Quantise bits + change into the module's weight; without a change put the very bits back."""
    _write(module, *((bits.codes, bits.state) if change is None else _encode(module, bits, bits.plain + change)))


def check_merge(adapter: Merging, requantise: bool) -> None:
    """UserError where a merge would have to quantise again and was not told to; it says what would be lost."""
    for weight, host in adapter.weights().items():
        if is_quantised(weight) and not requantise:
            path = next(p for p, m in adapter.model.named_modules() if m is host)
            bits, change = keep(host), next(c for w, c in adapter.changes() if w is weight)
            lost = _lost(_decode(*_encode(host, bits, bits.plain + change)), bits.plain, change)
            raise UserError(
                f"{path} is quantised: merging would decode it, add ΔW and quantise it again, and {lost:.0%} of ΔW"
                " would be lost there in rounding. Merge into the unquantised model, go on unmerged, or use"
                " merge(requantise=True)"
            )


def loss_of_merge(adapter: Merging, kept: dict[Any, Any]) -> dict[str, float]:
    """{module path: ‖what rounding took or added‖_F / ‖ΔW‖_F} for the quantised weights of a merged adapter."""
    found = {}
    paths = {id(m): p for p, m in adapter.model.named_modules()}
    changes = dict(adapter.changes())
    for weight, host in adapter.weights().items():
        if is_quantised(weight):
            found[paths[id(host)]] = _lost(decode(host), cast(Bits, kept[weight]).plain, changes[weight])
    return found


def _lost(after: Tensor, before: Tensor, change: Tensor) -> float:
    size = change.norm()
    return float((after - before - change).norm() / size) if size > 0 else 0.0


# ---- the two kinds of bitsandbytes ---------------------------------------------------------------------------------
def _read(module: nn.Module) -> tuple[Tensor, Any]:
    weight = cast(Any, module.weight)
    kind = type(weight).__name__
    if kind == "Params4bit" and weight.quant_state is not None:
        return weight.data, weight.quant_state
    if kind == "Int8Params":
        scale = weight.SCB if weight.SCB is not None else cast(Any, module).state.SCB
        return weight.data, scale
    raise UserError(f"a weight of {weight.dtype} ({kind}) is quantised in a way that cannot be decoded here")


def _decode(codes: Tensor, state: Any) -> Tensor:
    if isinstance(state, Tensor):  # int8: a scale for every row
        return codes.float() * (state.float() / 127)[:, None]
    import bitsandbytes.functional as bnb

    if getattr(state, "packing_format_for_cpu", False):  # what processors with AVX512-BF16 make of it at the first pass
        codes, state = bnb._convert_weight_packed_for_cpu_inverse(codes, copy.copy(state))
        if not state.nested:  # then it leaves the scales as the packing turned them
            state.absmax = state.absmax.T.reshape(-1).float()
    return bnb.dequantize_4bit(codes, state).float()


def _encode(module: nn.Module, bits: Bits, W: Tensor) -> tuple[Tensor, Any]:
    import bitsandbytes.functional as bnb

    if isinstance(bits.state, Tensor):
        codes, scale, _ = bnb.int8_vectorwise_quant(W.half())
        return codes, scale
    weight = cast(Any, module.weight)
    how = {n: getattr(weight, n) for n in ("blocksize", "compress_statistics", "quant_type", "quant_storage")}
    packed = getattr(bits.state, "packing_format_for_cpu", False)
    return bnb.quantize_4bit(W.to(bits.state.original_dtype if packed else bits.state.dtype), **how)


def _write(module: nn.Module, codes: Tensor, state: Any) -> None:
    weight = cast(Any, module.weight)
    with torch.no_grad():
        weight.data = codes.clone()
    if isinstance(state, Tensor):
        inner = cast(Any, module).state
        if inner.SCB is not None:  # after a first forward the module holds them
            inner.CB, inner.SCB = weight.data, state
        else:
            weight.CB, weight.SCB = weight.data, state
    else:
        weight.quant_state = state
        cast(Any, module).quant_state = state
