"""How long a run takes on this machine, known before it starts.

A step's floating point operations over the rate that this machine's own matrix products reach, times what everything
else costs; and a fixed part, since even a step of one token reads all weights. The factor starts from a figure measured
on one processor and is corrected after every run: what came over what was foretold is kept for each machine, model and
dtype.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_core import fast, machine
from lora_core.budget import STREAM, budget, budget_coefficients
from lora_core.home import home, read_json, write_json
from lora_core.spec import LoraSpec

if TYPE_CHECKING:
    from lora_core.objective import Objective
    from lora_core.tasks import Row, Task
    from lora_core.train import TrainConfig

# Time of a step's operations over that of as many operations in plain matrix products, before this machine has trained.
# Measured on two cores with AVX2: 53 to 852 tokens of SmolLM2-135M, 0.20 s and 3.55 ms a token.
OVERHEAD = 1.22
# What is not products gains little from bfloat16: on a CPU a step in it takes at least this share of one in float32,
# however fast its products are. Measured on two cores with AMX, whose products are six times as fast: 0.6 to 0.75.
LEAST = 0.75
SAMPLE = 256  # rows that are tokenised to know how long rows are


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds that a run will take: step_s for a step, eval_s for one measurement of the held-out loss, total_s.

    tokens and labelled are those that an average step computes; steps and evals how many there are.
    """

    step_s: float
    eval_s: float
    total_s: float
    tokens: int
    labelled: int
    steps: int
    evals: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(model: nn.Module, spec: LoraSpec, task: Task, config: TrainConfig, tokenizer: Any = None,
             objective: Objective | None = None) -> Estimate:  # fmt: skip
    """How long `train` with these settings takes, from the lengths of the task's rows and this machine's speed.

    objective  None for what a language model is trained on: the rows' pairs, or their completions
    """
    from lora_core.preference import PASSES, worse
    from lora_core.tasks.encode import encode_many
    from lora_core.train import tokenizer_of

    shared = fast.looks_like_llama(model) and (objective is None or objective.name in ("lm", "preference"))
    batches = _sample(task.train, config, shared)
    at = sorted(i for b in batches for i in b)  # in their own order: the first row that is wrong is told of
    sample = [task.train[i] for i in at]
    pairs = objective.name == "preference" if objective is not None else any(r.rejected for r in sample)
    if objective is None:
        read = partial(encode_many, tokenizer or tokenizer_of(model), template=task.template,
                       max_tokens=config.max_tokens)  # fmt: skip
        items: list[tuple[Any, ...]] = list(zip(read(sample), read([worse(r) for r in sample])) if pairs
                                            else zip(read(sample)))  # fmt: skip
    else:
        items = [(e.chosen, e.rejected) if pairs else (e,) for e in objective.encode(sample)]
    texts = dict(zip(at, items, strict=True))
    tokens = labelled = 0
    for batch in batches:
        mine = [t for i in batch for t in texts[i]]
        tokens += fast.beginnings([t.ids[:-1] for t in mine]) if shared else sum(map(len, mine))
        labelled += sum(len(t) - getattr(t, "start", len(t) - 1) for t in mine)  # a text to classify has one label
    rows, known = config.batch_size * config.accumulate, sum(map(len, batches))
    load = {"tokens": round(rows * tokens / max(1, known)), "labelled": round(rows * labelled / max(1, known))}
    passes = PASSES if pairs else 1.0
    step_s = passes * seconds_per_step(model, spec, **load)
    held = min(len(task.test), config.eval_rows)
    # Measuring is a forward pass: less than half of a step's work for each token.
    eval_s = passes * 0.45 * budget(model, spec, **load).step_flops * seconds_per_flop(model) * held / rows
    evals = len(config.eval_steps) + 1 if held else 0
    return Estimate(step_s=step_s, eval_s=eval_s, total_s=config.steps * step_s + evals * eval_s, steps=config.steps,
                    evals=evals, **load)  # fmt: skip


def _sample(rows: Sequence[Row], config: TrainConfig, shared: bool) -> list[list[int]]:
    """Batches of indices as training has them, of about SAMPLE rows in all, put together by the letters of the rows."""
    from lora_core.objective import bucketed

    alike = [(r.prompt, r.messages[:-1]) for r in rows] if shared else None
    order = bucketed([len(r.prompt) + len(r.completion) for r in rows], config.batch_size,
                     torch.Generator().manual_seed(config.seed), alike=alike)  # fmt: skip
    return order[: max(1, SAMPLE // config.batch_size)]


def seconds_per_step(model: nn.Module, spec: LoraSpec, *, tokens: int, labelled: int | None = None) -> float:
    """Seconds of one optimiser step of `tokens` tokens, `labelled` of them with a loss, on the model's own device."""
    flops = budget(model, spec, tokens=tokens, labelled=labelled).step_flops
    return (flops + 4 * budget_coefficients(model)["body"] * STREAM) * seconds_per_flop(model)


def seconds_per_flop(model: nn.Module) -> float:
    """The inverse of the speed that training this model reaches here, in s/flop."""
    place, dtype = _place(model)
    return _factor(model) / machine.gemm_rate(dtype, place)


def learn(model: nn.Module, spec: LoraSpec, *, steps: int, tokens: int, train_s: float) -> None:
    """Correct this machine's factor by a run: `steps` steps of `tokens` tokens in all took `train_s` seconds."""
    if steps < 3 or tokens <= 0 or train_s <= 0:
        return
    foretold_s = steps * seconds_per_step(model, spec, tokens=max(1, tokens // steps))
    known, key = _read(), _key(model)
    new = _factor(model) * min(20.0, max(0.05, train_s / foretold_s))
    known[key] = 0.3 * known[key] + 0.7 * new if key in known else new
    with contextlib.suppress(OSError, ValueError):  # a read-only cache costs the correction, nothing else
        write_json(home() / "speed.json", known)


def _factor(model: nn.Module) -> float:
    value = _read().get(_key(model))
    if isinstance(value, float) and 0.01 < value < 1000:
        return value
    place, dtype = _place(model)
    if place != "cpu" or dtype != "bfloat16":
        return OVERHEAD
    return OVERHEAD * max(1.0, LEAST * machine.gemm_rate(dtype, place) / machine.gemm_rate("float32", place))


def _read() -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        known = read_json(home() / "speed.json")
        return known if isinstance(known, dict) else {}
    return {}


def _place(model: nn.Module) -> tuple[str, str]:
    p = next(model.parameters())
    dtype = str(p.dtype).removeprefix("torch.")
    return p.device.type, dtype if dtype in machine.DTYPES else "float32"


def _key(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    shape = [getattr(config, n, None) for n in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")]
    what = json.dumps([machine.fingerprint(), _place(model), shape], sort_keys=True)
    return hashlib.sha256(what.encode()).hexdigest()[:16]
