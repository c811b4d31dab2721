"""latency: does LoRA slow inference down? Forward times of the bare model, with LoRA merged and unmerged, with adapter
layers and with a prefix. Run it on a quiet machine.
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
UNITS, TOKENS = 64, 16  # of adapter layers: 3 % of the model, as 11M are of GPT-2 medium in Table 1; of a prefix
NOISE = 0.03  # "no additional latency": within 3 % of the bare model
WAYS = ("base", "merged", "unmerged", "bottleneck", "prefix")
NAMES = {"merged": "merged LoRA", "unmerged": "unmerged", "bottleneck": "adapter layers", "prefix": "a prefix"}


def run(lab: Lab) -> list[Row]:
    """They take turns, so that whatever else the machine does hits all of them alike."""
    shapes = lab.choose(((1, 32), (16, 32)), ((1, 32), (1, 128), (16, 64), (32, 64)))
    repeats = lab.steps(12, 16)
    cells = [Cell(f"{b}×{n}", lambda b=b, n=n: _measure(lab, b, n, repeats), b * n + 64) for b, n in shapes]
    return [row for rows in lab.run(cells).values() for row in rows]


def _measure(lab: Lab, batch: int, length: int, repeats: int) -> list[Row]:
    import torch

    import lora_core as lc
    from lora_core.methods import method_spec

    model, _ = lab.writer()
    bare, other = (lab.keep(name, lambda: deepcopy(model)) for name in ("bare", "other"))
    ids = torch.randint(5, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    adapter = lc.attach(model, SPEC, "latency")
    added = {n: lc.attach(other, method_spec(n, size), n) for n, size in (("bottleneck", UNITS), ("prefix", TOKENS))}
    models = {w: bare if w == "base" else other if w in added else model for w in WAYS}
    times: dict[str, list[float]] = {w: [] for w in WAYS}
    try:
        with torch.no_grad():
            for f in (adapter.factors(k) for k in adapter.sites):
                f.B.normal_(0, 0.01)
            for i in range(repeats + 1):  # the first round warms up
                lab.at(i / (repeats + 1))
                for way in WAYS:
                    (adapter.merge if way == "merged" else adapter.unmerge)()
                    for name, a in added.items():
                        a.enable(name == way)
                    m = models[way]
                    m(input_ids=ids[:1, :1])  # leaves the weights that the switch touched as they will be found
                    at = time.perf_counter()
                    m(input_ids=ids)
                    if i:
                        times[way].append(1e3 * (time.perf_counter() - at))
    finally:
        adapter.unmerge()
        detach_all(model)
        detach_all(other)
    return [{"batch": batch, "length": length, "way": w, "ms": t} for w, t in times.items()]


def judge(rows: Sequence[Row]) -> tuple[str, str]:
    """Merged LoRA within 3 % of the bare model at every size: the median ratio of runs that stood side by side. Adapter
    layers slower than it at batch 1, and there by more than in the largest batch."""
    merged: list[bool | None] = []
    sizes: dict[str, list[tuple[float, tuple[float, float, float], str]]] = {}
    behind: dict[int, list[tuple[float, float, float]]] = {}
    for batch, length in dict.fromkeys((r["batch"], r["length"]) for r in rows):
        ms = {r["way"]: r["ms"] for r in by(rows, batch=batch, length=length)}
        ratio = {w: median([a / b for a, b in zip(t, ms["base"], strict=True)]) for w, t in ms.items() if w != "base"}
        _, least, most = ratio["merged"]
        inside, outside = 1 - NOISE <= least and most <= 1 + NOISE, least > 1 + NOISE or most < 1 - NOISE
        merged.append(True if inside else False if outside else None)
        behind.setdefault(batch, []).append(ratio["bottleneck"])
        for w, m in ratio.items():
            sizes.setdefault(w, []).append((m[0], m, f"{batch} × {length}"))
    ones, many = behind[min(behind)], behind[max(behind)]
    slower = every(_longer(m, (1.0, 1.0, 1.0)) for m in ones)
    most_at_one = every(_longer(m, n) for m in ones for n in many) if len(behind) > 1 else None
    said = [f"{NAMES.get(w, w)} {_range(found)}" for w, found in sizes.items()]
    count = f"{len(merged)} sizes" if len(merged) > 1 else "one size"
    return verdict([every(merged), slower, most_at_one]), f"Of the bare model's time, at {count}: {'; '.join(said)}."


def _longer(m: tuple[float, float, float], n: tuple[float, float, float]) -> bool | None:
    """Whether m is above n; None where their intervals overlap."""
    return True if m[1] > n[2] else False if m[2] <= n[1] else None


def _range(found: Sequence[tuple[float, tuple[float, float, float], str]]) -> str:
    """The least and the most of some sizes' median ratios, with their spread and where that was."""
    ends = [min(found), max(found)] if len(found) > 1 else found
    return " to ".join(f"{m[0]:.2f} ({m[1]:.2f}–{m[2]:.2f}, at {where})" for _, m, where in ends)


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
