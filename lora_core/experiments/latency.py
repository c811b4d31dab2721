"""latency: does LoRA slow inference down? Forward times of the bare model, with merged LoRA and with unmerged LoRA.

Run it on a quiet machine. Adapter layers and prefixes, which the paper's Table 1 compares with, are not measured here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING

from lora_core.experiments.experiment import Experiment, Row
from lora_core.experiments.lab import Cell
from lora_core.experiments.training import detach_all
from lora_core.experiments.verdicts import by, every, median, verdict
from lora_core.spec import LoraSpec

if TYPE_CHECKING:
    from lora_core.experiments.lab import Lab

SPEC = LoraSpec(targets=("q", "v"), rank=8, alpha=16)
NOISE = 0.03  # "no additional latency": within 3 % of the bare model
WAYS = ("base", "merged", "unmerged")


def run(lab: Lab) -> list[Row]:
    """The three take turns, so that whatever else the machine does hits all of them alike."""
    shapes = lab.choose(((1, 32), (16, 32)), ((1, 32), (1, 128), (16, 64), (32, 128)))
    repeats = lab.steps(12, 30)
    cells = [Cell(f"{b}×{n}", lambda b=b, n=n: _measure(lab, b, n, repeats), b * n + 64) for b, n in shapes]
    return [row for rows in lab.run(cells).values() for row in rows]


def _measure(lab: Lab, batch: int, length: int, repeats: int) -> list[Row]:
    import torch

    import lora_core as lc

    model, _ = lab.writer()
    bare = lab.keep("bare", lambda: deepcopy(model))
    ids = torch.randint(5, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    adapter = lc.attach(model, SPEC, "latency")
    times: dict[str, list[float]] = {w: [] for w in WAYS}
    try:
        with torch.no_grad():
            for f in (adapter.factors(k) for k in adapter.sites):
                f.B.normal_(0, 0.01)
            for i in range(repeats + 1):  # the first round warms up
                lab.at(i / (repeats + 1))
                for way in WAYS:
                    (adapter.merge if way == "merged" else adapter.unmerge)()
                    m = bare if way == "base" else model
                    m(input_ids=ids[:1, :1])  # leaves the weights that the switch touched as they will be found
                    at = time.perf_counter()
                    m(input_ids=ids)
                    if i:
                        times[way].append(1e3 * (time.perf_counter() - at))
    finally:
        adapter.unmerge()
        detach_all(model)
    return [{"batch": batch, "length": length, "way": w, "ms": t} for w, t in times.items()]


def judge(rows: Sequence[Row]) -> tuple[str, str]:
    """Merged LoRA within 3 % of the bare model at every size: the median ratio of runs that stood side by side."""
    parts, text = [], []
    for batch, length in dict.fromkeys((r["batch"], r["length"]) for r in rows):
        ms = {w: by(rows, batch=batch, length=length, way=w)[0]["ms"] for w in WAYS}
        ratio = {w: median([a / b for a, b in zip(ms[w], ms["base"], strict=True)]) for w in WAYS[1:]}
        _, least, most = ratio["merged"]
        inside, outside = 1 - NOISE <= least and most <= 1 + NOISE, least > 1 + NOISE or most < 1 - NOISE
        parts.append(True if inside else False if outside else None)
        text.append(f"at batch {batch} × {length} tokens {_said(ratio['merged'])} merged and"
                    f" {_said(ratio['unmerged'])} unmerged (its median: {median(ms['base'])[0]:.0f} ms)")  # fmt: skip
    return verdict([every(parts)]), f"Times relative to the bare model, {'; '.join(text)}."


def _said(m: tuple[float, float, float]) -> str:
    return f"{m[0]:.3f} ({m[1]:.3f} to {m[2]:.3f})"


EXPERIMENT = Experiment(
    name="latency",
    question="Does LoRA add latency to inference?",
    section="4.1 and 3",
    claim="Merged into the weights, LoRA adds no latency at all, by construction; adapter layers do, most at batch 1.",
    choices=("None when merged; some when unmerged.",
             "None, merged or not: the factors are tiny.",
             "Some in both: the adapter is still there."),
    answer=0,
    paper={"model": "GPT-2 medium, RTX 8000", "batch/length": ["32/512", "16/256", "1/128"],
           "merged LoRA ms": [1449.4, 338.0, 19.8], "Adapter-L ms": [1482.0, 354.8, 23.9],
           "Adapter-H ms": [1492.2, 366.3, 25.8]},
    run=run,
    judge=judge,
)  # fmt: skip
