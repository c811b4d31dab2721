"""What an adapter costs before it is trained: parameters, bytes on disk, memory, floating point operations.

Everything is counted from the model's shapes, so a model on the meta device (a config without weights) will do.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn

from lora_core.costs import Step, anchored, costs
from lora_core.errors import UserError
from lora_core.families import STAGES
from lora_core.methods.added import added_shapes
from lora_core.selection import TOP, find_direct, select
from lora_core.sites import Site
from lora_core.spec import LoraSpec

FACTOR = 4  # bytes of a factor's number: float32 on disk, and in memory unless the model is float64
STREAM = 56  # tokens: what a step costs beside its tokens (reading all weights twice, the optimiser), in tokens' work


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Training memory in bytes, by what holds it.

    weights      the model, and the adapter's own numbers: float32, frozen ones too
    gradients    of what is trained
    optimiser    Adam's two statistics, float32
    activations  kept for the backward pass as transformers computes, without attention's scores: an estimate, within a
                 third for most families (fast.py keeps a fifth less, Gemma's many norms twice as much); all else is
                 exact, but for the scales of quantised weights
    copies       of an adapter: what train() keeps of the last step whose loss was finite; of full fine-tuning: a
                 float32 master copy of weights that are 16 bits wide
    """

    weights: int
    gradients: int
    optimiser: int
    activations: int
    copies: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimiser + self.activations + self.copies


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The price of one adapter; all sizes in bytes.

    trainable   numbers that are trained: the sum of the six that follow (section 7.1: |Θ|)
    factors     A's and B's: r·(out + in) for every adapted matrix, r·out where A is frozen
    head        of modules outside the base model that are trained in full: a classifier's head
    direct      of norms, biases and other modules that are trained themselves
    magnitudes  DoRA's, one for each row of an adapted matrix; gates: a mask's, one for each direction
    added       of bottlenecks and prefixes
    fraction    trainable / total; total: numbers in the model, tied ones once, of which `tied` are shared by modules
    matrices    how many matrices are adapted; per_target: {target, or module trained in full: trained numbers}
    file_bytes  adapter_model.safetensors, with all gates open; full_bytes: a full copy of the model in its dtype
    memory      of training, by part; train_bytes is its total; full_memory, full_train_bytes: of full fine-tuning
    step_flops  forward and backward of `tokens` tokens, of which `labelled` are predicted; full_step_flops: with the
                gradients of all weights. Products with matrices only: left out are attention's scores, norms,
                routers, poolers and what a classifier does once for a text; where attention and MLP are side by side
                (GPT-NeoX), the lowest layer counts a little too much
    """

    trainable: int
    factors: int
    head: int
    direct: int
    magnitudes: int
    gates: int
    added: int
    fraction: float
    total: int
    tied: int
    matrices: int
    per_target: dict[str, int]
    file_bytes: int
    full_bytes: int
    memory: Memory
    full_memory: Memory
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

    An encoder-decoder has so many tokens on either side. Raises UserError for a spec that the model cannot have, as
    `attach` does.
    """
    labelled = tokens // 2 if labelled is None else labelled
    sites, direct, new = select(model, spec), find_direct(model, spec), added_shapes(model, spec)
    if not sites and not direct and not new:
        raise UserError("nothing to adapt: the targets name no matrix and no vector of this model")
    c = costs(model)
    ranks = {s.key: spec.rank_of(s.key, s.path, s.target) for s in sites}
    per_target: Counter[str] = Counter()
    factors = magnitudes = gates = 0
    for s in sites:
        r = ranks[s.key]
        own = (r * (s.out + s.in_ * spec.train_A), s.out * spec.dora, r * bool(spec.mask))
        factors, magnitudes, gates = factors + own[0], magnitudes + own[1], gates + own[2]
        per_target[s.target] += sum(own)
    head = vectors = 0
    copies: dict[str, int] = {}
    for name, places in direct.items():
        (path, last), *_ = places
        module = model.get_submodule(path)
        p = cast(nn.Parameter, module._parameters[last])
        outside = id(p) in c.outside
        head, vectors = head + p.numel() * outside, vectors + p.numel() * (not outside)
        per_target[_asked(spec, path, last, outside)] += p.numel()
        once = p.ndim < 2 or isinstance(module, nn.Embedding) or (outside and not c.vocab)
        copies[name] = 0 if once else p.numel()
    added = 0
    for name, shape in new.items():
        per_target[name.rsplit(".", 2)[1]] += math.prod(shape)
        added += math.prod(shape)
    n = factors + head + vectors + magnitudes + gates + added
    stored = {k: r * (1 + anchored(spec)) for k, r in ranks.items()}
    held = n - factors + sum(stored[s.key] * (s.out + s.in_) for s in sites)
    size = max(FACTOR, c.width)
    step = Step(c=c, spec=spec, sites=sites, ranks=ranks, copies=copies, added=new)
    logits = labelled * c.vocab * 12
    memory = Memory(weights=c.bytes + size * held, gradients=size * n, optimiser=2 * size * n, copies=size * n,
                    activations=step.kept(tokens) + logits)  # fmt: skip
    full = Memory(weights=c.bytes, gradients=c.width * c.total, optimiser=2 * size * c.total,
                  activations=int(tokens * (c.act_per_token + c.inputs_per_token)) + logits,
                  copies=FACTOR * c.total if c.width < FACTOR else 0)  # fmt: skip
    return Budget(
        trainable=n,
        factors=factors,
        head=head,
        direct=vectors,
        magnitudes=magnitudes,
        gates=gates,
        added=added,
        fraction=n / c.total,
        total=c.total,
        tied=c.tied,
        matrices=len(sites),
        per_target=dict(per_target),
        file_bytes=_file_bytes(
            _tensors(model, spec, sites, stored, direct)
            | {f"base_model.model.{name}": shape for name, shape in new.items()}
        ),
        full_bytes=c.bytes,
        memory=memory,
        full_memory=full,
        train_bytes=memory.total,
        full_train_bytes=full.total,
        step_flops=step.flops(tokens, labelled),
        full_step_flops=6.0 * (c.body * tokens + c.hidden * c.vocab * labelled),
        tokens=tokens,
        labelled=labelled,
    )


def _asked(spec: LoraSpec, path: str, name: str, outside: bool) -> str:
    """What in the spec a parameter is trained for."""
    module = next((n for n in spec.full if f"{path}.{name}.".startswith(f"{n}.")), None)
    if module or (outside and "head" in spec.full):
        return module or "head"
    many = next((n for n in spec.full if n == "all" or TOP.fullmatch(n)), "head")
    return next((t for t in ("bias", "norm") if t in spec.targets and (t == "norm" or name == "bias")), many)


def _tensors(model: nn.Module, spec: LoraSpec, sites: Sequence[Site], ranks: dict[str, int],
             direct: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """{name: shape} of what `saving.save_adapter` writes: slices of one weight as one block, of experts as another."""
    weights: dict[tuple[str, str], list[Site]] = {}
    for s in sites:
        weights.setdefault((s.path, s.param), []).append(s)
    shapes: dict[str, tuple[int, ...]] = {}
    for (path, param), parts in weights.items():
        first, blocks = parts[0], Counter[int | None]()
        for s in parts:
            blocks[s.expert] += ranks[s.key]
        module, r = model.get_submodule(path), max(blocks.values())
        if first.expert is not None:  # of all experts, with the largest rank
            r *= cast(nn.Parameter, module._parameters[param]).shape[0]
            order = [n for n in module._parameters if (path, n) in weights]
            path += ".base_layer" * (len(order) - 1 - order.index(param))
        for at in (path, *first.also):
            if first.lookup and isinstance(model.get_submodule(at), nn.Embedding):
                shapes |= {f"{at}.lora_embedding_A": (r, first.in_), f"{at}.lora_embedding_B": (first.full, r)}
            else:
                into, out = (first.full, first.in_) if first.lookup else (first.in_, first.full)
                shapes |= {f"{at}.lora_A.weight": (r, into), f"{at}.lora_B.weight": (out, r)}
        if spec.dora:
            shapes[f"{path}.lora_magnitude_vector"] = (first.full,)
    adapted = {p for s in sites for p in (s.path, *s.also)}
    for places in direct.values():
        for path, name in places:
            own = cast(nn.Parameter, model.get_submodule(path)._parameters[name])
            shapes[f"{path}{'.base_layer' * (path in adapted)}.{name}"] = tuple(own.shape)
    return {f"base_model.model.{name}": shape for name, shape in shapes.items()}


def _file_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Exact size of a safetensors file: 8 bytes, the header padded to a multiple of 8, the numbers as float32."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in sorted(shapes):  # safetensors orders tensors of one dtype by name
        size = FACTOR * math.prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [at, at + size]}
        at += size
    text = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-text // 8) * 8 + at


def budget_coefficients(model: nn.Module) -> dict[str, Any]:
    """The same numbers as coefficients, for a page that must answer a dial at once; `budget` is the truth.

    They are for matrices with names, in layers that are alike; static/budget.js puts them together. A step takes as
    long as step_flops + 4·body·stream operations (see estimate.py).
    """
    c = costs(model)
    first: dict[str, list[Site]] = {}
    for s in c.sites:
        if s.layer == next(f.layer for f in c.sites if f.target == s.target):
            first.setdefault(s.target, []).append(s)
    stages = {STAGES[t]: max(s.in_ * c.uses[s.key].rows for s in first[t]) * c.repeats for t in first}
    layer = [(c.uses[s.key], s.out * s.in_) for s in c.sites if s.layer == c.sites[0].layer]
    return {
        "total": c.total,
        "per_rank": {t: sum(s.out + s.in_ for s in hits) for t, hits in first.items()},
        "out": {t: sum(s.out for s in hits) for t, hits in first.items()},
        "stored": {t: sum(s.full + s.in_ for s in hits) for t, hits in first.items()},  # a slice: with zero rows
        "modules": {t: len(hits) for t, hits in first.items()},
        "stage": {t: STAGES[t] for t in first},
        "inputs": stages,
        "below": {i: sum(u.times * n for u, n in layer if u.place[1] <= i) * (c.repeats == 1) for i in stages},
        "layers": c.layers,
        "file_bytes": FACTOR,
        "header": 250,
        "weights": c.bytes,
        "width": c.width,
        "act_per_token": c.act_per_token,
        "inputs_per_token": c.inputs_per_token,
        "logit_bytes": 12 * c.vocab,
        "number": max(FACTOR, c.width),
        "full_state": c.width + 2 * max(FACTOR, c.width) + (FACTOR if c.width < FACTOR else 0),
        "body": c.body,
        "stream": STREAM,
        "head": c.hidden * c.vocab,
    }


def meta_model(config: Any, *, labels: int | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """A model without weights from a transformers config: enough for `budget`, whatever its size.

    labels  of a classifier: the model is then one, with a head; else it is a causal language model, an
            encoder-decoder or a bare encoder, as its config says
    """
    import transformers as tr

    from lora_core.models import ENCODERS

    kind = config.model_type
    build: Any = (
        tr.AutoModelForSequenceClassification if labels
        else tr.AutoModelForSeq2SeqLM if config.is_encoder_decoder
        else tr.AutoModel if kind in ENCODERS else tr.AutoModelForCausalLM)  # fmt: skip
    if labels:
        config = deepcopy(config)
        config.num_labels = labels
    with torch.device("meta"):
        return cast(nn.Module, build.from_config(config, dtype=dtype)).eval()
