"""What an adapter costs before it is trained: parameters, bytes on disk, memory, floating point operations.

Everything is counted from the model's shapes, so a model on the meta device (a config without weights) will do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn

from lora_core.families import TARGETS
from lora_core.layers import Factors
from lora_core.sites import Site, find_sites, select
from lora_core.spec import LoraSpec

FACTOR = 4  # bytes of a factor's number: factors are float32 in memory and on disk
ADAM = 8  # Adam's two statistics of a trained number, float32
STREAM = 56  # tokens: what a step costs beside its tokens (reading all weights twice, the optimiser), in tokens' work
COPY = 4  # train() keeps the factors of the last step whose loss was finite


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The price of one adapter; all sizes in bytes.

    trainable         numbers in A and B: r·(out + in) for every adapted matrix (section 7.1: |Θ|)
    fraction          of the model's numbers
    total             numbers in the model, tied ones once
    matrices          how many matrices are adapted; per_target: {target: numbers in its A's and B's}
    file_bytes        adapter_model.safetensors; full_bytes: a full copy of the model in its dtype
    weight_bytes      the frozen model in memory
    activation_bytes  kept for the backward pass of `tokens` tokens, of which `labelled` are predicted
    train_bytes       training in all: weights, activations, and 20 bytes for each trained number (itself, gradient,
                      Adam's two, a copy)
    full_train_bytes  the same for full fine-tuning: gradient and Adam for every number, a float32 master copy of
                      weights that are 16 bits wide, and every matrix's input kept
    step_flops        forward and backward of these tokens; full_step_flops with gradients of all weights
    """

    trainable: int
    fraction: float
    total: int
    matrices: int
    per_target: dict[str, int]
    file_bytes: int
    full_bytes: int
    weight_bytes: int
    activation_bytes: int
    train_bytes: int
    full_train_bytes: int
    step_flops: float
    full_step_flops: float
    tokens: int
    labelled: int

    def storage(self, tasks: int) -> tuple[int, int]:
        """Bytes for so many tasks: as full copies, and as one base with an adapter for each.

        For one task the adapter needs more, since the base is needed too; from the second on it needs less (section
        4.2: a hundred tasks of GPT-3 are 354 GB instead of 35 TB).
        """
        return tasks * self.full_bytes, self.full_bytes + tasks * self.file_bytes

    @property
    def flops_per_token(self) -> float:
        """Floating point operations of a training step, for each of its tokens."""
        return self.step_flops / self.tokens

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def budget(model: nn.Module, spec: LoraSpec, *, tokens: int = 512, labelled: int | None = None) -> Budget:
    """The budget of a spec on a model for steps of `tokens` tokens, of which `labelled` (a half) carry a loss.

    Raises UserError for a spec that the model cannot have, as `attach` does.
    """
    labelled = tokens // 2 if labelled is None else labelled
    sites = select(model, spec)
    ranks = {s.key: spec.rank_of(s.key, s.path, s.target) for s in sites}
    counts = {s.key: ranks[s.key] * (s.out + (s.in_ if spec.train_A else 0)) for s in sites}
    stored = {k: 2 * r if spec.init in ("pissa", "gradient") else r for k, r in ranks.items()}  # with their anchors
    per_target: dict[str, int] = {}
    for s in sites:
        per_target[s.target] = per_target.get(s.target, 0) + counts[s.key]
    n = sum(counts.values())
    c = _costs(model)
    lowest = min((s.layer for s in sites if s.layer is not None), default=0)
    depth = (c.layers - lowest) / c.layers
    acts = int(tokens * c.act_per_token * depth) + labelled * c.vocab * 12
    full_acts = int(tokens * (c.act_per_token + c.inputs_per_token)) + labelled * c.vocab * 12
    master = 4 if c.width < 4 else 0
    return Budget(
        trainable=n,
        fraction=n / c.total,
        total=c.total,
        matrices=len(sites),
        per_target=per_target,
        file_bytes=_file_bytes(sites, stored),
        full_bytes=c.bytes,
        weight_bytes=c.bytes,
        activation_bytes=acts,
        train_bytes=c.bytes + acts + (2 * FACTOR + ADAM + COPY) * n,
        full_train_bytes=c.bytes + full_acts + (c.width + ADAM + master) * c.total,
        step_flops=c.step_flops(tokens, labelled, depth, n),
        full_step_flops=3 * c.step_flops(tokens, labelled, 0, 0),
        tokens=tokens,
        labelled=labelled,
    )


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a model's shapes say: numbers, layers, and what a token costs in memory (bytes) and operations."""

    total: int
    bytes: int
    width: int  # bytes of a number
    layers: int
    body: int  # numbers in the layers' matrices
    hidden: int
    vocab: int
    act_per_token: float
    inputs_per_token: float

    def step_flops(self, tokens: int, labelled: int, depth: float, trainable: int) -> float:
        """Forward 2 operations a number and token; backward as many again, down to the lowest adapted layer only.

        The head costs both on labelled tokens alone. A factor's number costs 6: forward, and two gradients.
        """
        head = 4 * self.hidden * self.vocab * labelled
        return 2 * self.body * tokens * (1 + depth) + head + 6.0 * trainable * tokens


def _costs(model: nn.Module) -> Costs:
    own = {id(p): p for p in model.parameters()}
    for m in model.modules():  # an adapter that is attached is no part of the model
        if isinstance(m, Factors):
            for p in (m.A, m.B):
                own.pop(id(p), None)
    total = sum(p.numel() for p in own.values())
    size = sum(p.numel() * p.element_size() for p in own.values())
    width = max((p.element_size() for p in own.values()), default=4)
    sites = find_sites(model)
    layers = max((s.layer + 1 for s in sites if s.layer is not None), default=1)
    config = getattr(model, "config", None)
    hidden = int(getattr(config, "hidden_size", 0) or 0)
    vocab = int(getattr(config, "vocab_size", 0) or 0)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    inner = max((s.out for s in sites if s.target in ("up", "gate")), default=4 * hidden)
    # Kept for the backward pass with frozen weights, in numbers a token and layer: two norms (2·2 hidden), the input
    # of the adapted projections, q, k, v and the output of attention, and three stages of the MLP's inner activation.
    kept, inputs = 9 * hidden + 3 * inner, 3 * hidden + inner
    return Costs(
        total=total,
        bytes=size,
        width=width,
        layers=layers,
        body=sum(s.out * s.in_ for s in sites),
        hidden=hidden,
        vocab=vocab if head is not None else 0,
        act_per_token=layers * kept * width,
        inputs_per_token=layers * inputs * width,
    )


def _file_bytes(sites: Sequence[Site], ranks: dict[str, int]) -> int:
    """Exact size of adapter_model.safetensors: 8 bytes, the header padded to a multiple of 8, the float32 factors."""
    modules: dict[str, list[Site]] = {}
    for s in sites:
        modules.setdefault(s.path, []).append(s)
    shapes: dict[str, tuple[int, int]] = {}
    for path, parts in modules.items():
        r, first = sum(ranks[s.key] for s in parts), parts[0]
        shapes[f"base_model.model.{path}.lora_A.weight"] = (r, first.in_)
        shapes[f"base_model.model.{path}.lora_B.weight"] = (first.full, r)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in sorted(shapes):  # safetensors orders tensors of one dtype by name
        a, b = shapes[name]
        header[name] = {"dtype": "F32", "shape": [a, b], "data_offsets": [at, at + FACTOR * a * b]}
        at += FACTOR * a * b
    text = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-text // 8) * 8 + at


def budget_coefficients(model: nn.Module) -> dict[str, Any]:
    """The same numbers as coefficients, for a page that must answer a dial at once; `budget` is the truth.

    With n = rank · Σ per_rank[target] · layers chosen, and m matrices: trainable = n, file_bytes ≈ 4·n + header·m,
    train_bytes = weights + tokens·act_per_token·depth + labelled·logit_bytes + 20·n, where depth is the share of
    layers at or above the lowest chosen one, and step_flops as `Costs.step_flops`. A step takes as long as
    step_flops + 4·body·stream operations (see estimate.py).
    """
    c = _costs(model)
    sites = find_sites(model)
    first = {t: next(s for s in sites if s.target == t) for t in TARGETS if any(s.target == t for s in sites)}
    return {
        "total": c.total,
        "per_rank": {t: s.out + s.in_ for t, s in first.items()},
        "layers": c.layers,
        "file_bytes": FACTOR,
        "header": 250,
        "weights": c.bytes,
        "act_per_token": c.act_per_token,
        "inputs_per_token": c.inputs_per_token,
        "logit_bytes": 12 * c.vocab,
        "state": 2 * FACTOR + ADAM + COPY,
        "full_state": c.width + ADAM + (4 if c.width < 4 else 0),
        "body": c.body,
        "stream": STREAM,
        "head": c.hidden * c.vocab,
    }


def meta_model(config: Any) -> nn.Module:
    """A model without weights from a transformers config: enough for `budget`, whatever its size."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return cast(nn.Module, AutoModelForCausalLM.from_config(config))
