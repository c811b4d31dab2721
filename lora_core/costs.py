"""What a model's shapes say of a training step: operations, and bytes kept for the backward pass.

Every matrix has a place, (layer, stage); outside the layers it is (-1, 0) before them or (number of layers, 0) after
them. Gradients flow down to the lowest place where something is trained, and no further.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import nn

from lora_core.families import STAGES
from lora_core.sites import Site, find_sites, weight_shape
from lora_core.spec import LoraSpec

Place = tuple[int, int]


class Use(NamedTuple):
    """How a matrix is used: its place; a token makes `rows` rows there, and is multiplied by it `times` times."""

    place: Place
    times: float = 1.0
    rows: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Costs:
    """A model's numbers, and what a token costs in memory (bytes) and operations.

    total, tied      numbers, shared ones once; those that modules share. bytes: of all of them, width: of one
    outside          ids of the parameters outside the base model: a head's
    layers, repeats  of the model; how often each is applied (ALBERT's share their weights)
    sites, uses      the layers' matrices and {key: Use}; order: {module path: place}
    body             numbers in the layers' matrices, each as often as a token is multiplied by it
    vocab            0 where the model predicts no tokens
    act_per_token    bytes kept for the backward pass with all weights frozen; inputs_per_token: more with all trained
    """

    total: int
    tied: int
    bytes: int
    width: int
    outside: frozenset[int]
    layers: int
    repeats: int
    sites: list[Site]
    uses: dict[str, Use]
    order: dict[str, Place]
    body: float
    hidden: int
    vocab: int
    act_per_token: float
    inputs_per_token: float


def costs(model: nn.Module) -> Costs:
    """Count a model, without the adapters on it."""
    own: dict[int, int] = {}
    shared: Counter[int] = Counter()
    size, width = 0, 1
    modules = [(p, m) for p, m in model.named_modules(remove_duplicate=False) if ".lora" not in f".{p}"]
    for _, m in modules:
        for p in m._parameters.values():
            if p is None:
                continue
            shared[id(p)] += 1
            if id(p) not in own:
                shape = None if p.is_floating_point() else weight_shape(m)  # four bits are stored two in a byte
                own[id(p)] = shape[0] * shape[1] if shape else p.numel()
                size, width = size + p.numel() * p.element_size(), max(width, p.element_size())
    base: nn.Module = getattr(model, "base_model", model)
    config = getattr(model, "config", None)
    sites = find_sites(model)
    layers = max((s.layer + 1 for s in sites if s.layer is not None), default=1)
    groups = getattr(config, "num_hidden_groups", None)
    repeats = int(getattr(config, "num_hidden_layers", 1)) // groups if groups else 1
    hidden = int(getattr(config, "hidden_size", 0) or 0)
    vocab = int(getattr(config, "vocab_size", 0) or 0)
    uses = {s.key: _use(model, s, repeats) for s in sites}
    inner = max((s.out * uses[s.key].rows for s in sites if s.target in ("up", "gate")), default=4 * hidden)
    # Kept in numbers a token and layer: two norms with what is added around them, q, k, v and the output of attention,
    # three stages of the MLP's inner activation; then the inputs of the matrices that are trained.
    kept, inputs = 6 * hidden + 3 * inner, 3 * hidden + inner
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return Costs(
        total=sum(own.values()),
        tied=sum(own[i] for i, n in shared.items() if n > 1),
        bytes=size,
        width=width,
        outside=frozenset(own) - {id(p) for p in base.parameters()},
        layers=layers,
        repeats=repeats,
        sites=sites,
        uses=uses,
        order=_order([p for p, _ in modules], layers),
        body=sum(uses[s.key].times * s.out * s.in_ for s in sites),
        hidden=hidden,
        vocab=vocab if head is not None else 0,
        act_per_token=layers * repeats * kept * width,
        inputs_per_token=layers * repeats * inputs * width,
    )


def _use(model: nn.Module, s: Site, repeats: int) -> Use:
    place = (s.layer or 0, STAGES[s.target])
    if s.expert is None:
        return Use(place, repeats)
    n = len(cast(Any, model.get_submodule(s.path)._parameters[s.param]))
    used = int(getattr(getattr(model, "config", None), "num_experts_per_tok", n))
    return Use(place, used / n, used)


def _order(paths: Sequence[str], layers: int) -> dict[str, Place]:
    """The place of every module; what has no layer is before or after the layers as it is listed."""
    found: dict[str, Place] = {}
    numbers = [re.search(r"(?:^|\.)(\d+)\.", p) for p in paths]
    last = max((i for i, n in enumerate(numbers) if n), default=-1)
    for i, (path, n) in enumerate(zip(paths, numbers, strict=True)):
        found.setdefault(path, (int(n[1]), -1) if n else (-1, 0) if i < last else (layers, 0))
    return found


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step of an adapter: its matrices with their ranks; the parameters that are trained themselves, {name:
    how many of its numbers a token is multiplied by}; the shapes of what is added."""

    c: Costs
    spec: LoraSpec
    sites: Sequence[Site]
    ranks: Mapping[str, int]
    copies: Mapping[str, int]
    added: Mapping[str, tuple[int, ...]]

    def place(self, name: str) -> Place:
        """Of what is added: that of its host, a prefix's where the keys are."""
        host, kind, _ = name.rsplit(".", 2)
        return next((self.use(s).place for s in self.c.sites if s.path == host or kind == "prefix" and s.target == "k"
                     and s.path.startswith(f"{host}.")), self.c.order[host])  # fmt: skip

    def use(self, s: Site) -> Use:
        return self.c.uses.get(s.key) or Use(self.c.order[s.path])

    @property
    def start(self) -> Place:
        """The lowest place where something is trained."""
        start = min([self.use(s).place for s in self.sites] + [self.c.order[n.rpartition(".")[0]] for n in self.copies]
                    + [self.place(n) for n in self.added])  # fmt: skip
        return start if self.c.repeats == 1 or start[0] >= self.c.layers else (-1, 0)  # the first use is below others

    @property
    def experts(self) -> list[Site]:
        """The slices of the experts' parameters of which some are adapted: W0 + ΔW of the whole is formed."""
        hit = {(s.path, s.param) for s in self.sites if s.expert is not None}
        return [s for s in self.c.sites if (s.path, s.param) in hit]

    def kept(self, tokens: int) -> int:
        """Bytes kept for the backward pass."""
        c, start = self.c, self.start
        inputs = {(u.place, s.path * (s.key not in c.uses)): s.in_ * u.rows * c.repeats
                  for s in self.sites if not s.lookup and (u := self.use(s))}  # fmt: skip
        ranks = sum(self.ranks[s.key] + 2 * s.out * self.spec.dora for s in self.sites if s.expert is None)
        depth = max(0, c.layers - max(0, start[0])) / c.layers
        ranks += sum(sum(shape) for n, shape in self.added.items() if n.endswith((".down", ".up")))
        formed = sum(s.out * s.in_ for s in self.experts)
        return int(tokens * (c.act_per_token * depth + c.width * (sum(inputs.values()) + ranks))) + c.width * formed

    def flops(self, tokens: int, labelled: int) -> float:
        """Two for each number of a matrix and row, forward; as many for the gradient of what flows into it, and for
        that of a factor."""
        c, start = self.c, self.start
        flow = sum(u.times * s.out * s.in_ for s in c.sites if (u := c.uses[s.key]).place > start)
        total = 2 * (c.body + flow) * tokens + 2 * c.hidden * c.vocab * labelled * (1 + (start[0] < c.layers))
        for s in self.sites:
            r, use = self.ranks[s.key], self.use(s)
            up, down, flows = 2 * r * s.out, 2 * r * s.in_, use.place > start
            if s.expert is not None:  # ΔW and the gradients of its factors, whatever the tokens
                total += (2 + self.spec.train_A) * 2 * r * s.out * s.in_
            elif s.lookup:  # A's columns are picked; a tied head multiplies by them
                total += 3 * up * tokens + 3 * (up + down) * labelled * bool(s.also and c.vocab)
            else:
                each = 3 * up + down * (1 + self.spec.train_A + flows)
                each += (up + down) * (1 + flows) * anchored(self.spec)
                total += each * use.times * (labelled if use.place[0] >= c.layers else tokens)
            if self.spec.dora:  # the rows' lengths, once in a step
                total += 2 * r * (s.out * s.in_ + r * (s.out + s.in_))
        total += sum(2 * self.use(s).times * s.out * s.in_ for s in self.experts) * tokens
        for name, n in self.copies.items():
            total += 2 * n * (labelled if c.order[name.rpartition(".")[0]][0] >= c.layers else tokens)
        total += sum(6 * math.prod(s) * tokens for n, s in self.added.items() if n.endswith((".down", ".up")))
        return total


def anchored(spec: LoraSpec) -> bool:
    """Whether the factors have an anchor beside them (see `layers.Factors`): twice the rank, in memory and on disk."""
    return spec.init in ("pissa", "gradient")
