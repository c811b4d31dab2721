"""switch: is going from one task to another quick, and does one get W0 back? Time, bytes and drift of three ways."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lora_core.experiments.experiment import Experiment, Row
from lora_core.experiments.lab import Cell
from lora_core.experiments.verdicts import by, every, median, verdict
from lora_core.spec import LoraSpec

if TYPE_CHECKING:
    from lora_core.experiments.lab import Lab

SPEC = LoraSpec(targets=("q", "v"), rank=8, alpha=16)
SIZE = 0.02  # ‖ΔW‖/‖W0‖ of the two adapters: what a short fine-tune comes to
WAYS = ("subtract and add", "restore exactly", "unmerged")


def run(lab: Lab) -> list[Row]:
    """Every way in float32 and bfloat16, on a model of its own: its weights drift."""
    name, switches = lab.use("writer"), lab.choose(20, 200)
    dtypes = ("float32", "bfloat16")
    found = lab.run([Cell(d, lambda d=d: _measure(lab, name, d, switches)) for d in dtypes])
    return [row for d in dtypes for row in found[d]]


def _measure(lab: Lab, name: str, dtype: str, switches: int) -> list[Row]:
    import torch

    import lora_core as lc

    model, _ = lc.load_model(name, dtype=dtype, device="cpu")
    at = time.perf_counter()
    lc.load_model(name, dtype=dtype, device="cpu")
    load_s = time.perf_counter() - at
    pair = [lc.attach(model, SPEC, n, seed=i) for i, n in enumerate(("old", "new"))]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for a in pair:
            for key in a.sites:
                f = a.factors(key)
                f.B.normal_(generator=generator)
                f.B.mul_(SIZE * float(a.W0(key).float().norm()) / float(a.delta(key).norm()))
    weights = [*pair[0].weights()]
    kept = [w.detach().clone() for w in weights]
    size = sum(w.numel() * w.element_size() for w in weights)
    factors = sum(p.numel() * p.element_size() for a in pair for p in a.parameters())
    lc.switch(model, None, None)

    def subtract() -> Callable[[int], None]:
        lc.subtract_add(model, None, "old")
        return lambda i: lc.subtract_add(model, ("old", "new")[i % 2], ("new", "old")[i % 2])

    def restore() -> Callable[[int], None]:
        pair[0].enable()
        pair[0].merge()
        return lambda i: lc.switch(model, ("old", "new")[i % 2], ("new", "old")[i % 2])

    def unmerged() -> Callable[[int], None]:
        pair[0].enable()
        return lambda i: lc.switch(model, ("old", "new")[i % 2], ("new", "old")[i % 2])

    # reads and writes, counted in the code: two passes over the weights; one back, one to keep them, one to merge
    moved = {"subtract and add": 4 * size + factors, "restore exactly": 6 * size + factors // 2, "unmerged": 0}
    extra = {"subtract and add": 0, "restore exactly": size, "unmerged": 0}
    rows: list[Row] = []
    for share, (way, begin) in enumerate(zip(WAYS, (subtract, restore, unmerged), strict=True)):
        lab.at(share / 3)
        step = begin()
        times = []
        for i in range(switches):
            at = time.perf_counter()
            step(i)
            times.append(time.perf_counter() - at)
        times = times[1:]  # the first warms up
        last = ("old", "new")[switches % 2]
        if way == "subtract and add":
            lc.subtract_add(model, last, None)
        else:
            lc.switch(model, last, None)
        changed, drift = _drift(weights, kept)
        for w, k in zip(weights, kept, strict=True):
            with torch.no_grad():
                w.copy_(k)
        rows.append({"way": way, "dtype": dtype, "switches": switches, "ms": [1e3 * t for t in times],
                     "load_ms": 1e3 * load_s, "bytes_moved": moved[way], "bytes_kept": extra[way],
                     "entries_changed": changed, "drift": drift})  # fmt: skip
    return rows


def _drift(weights: Sequence[Any], kept: Sequence[Any]) -> tuple[float, float]:
    """Over all weights: (share of entries that are not W0's, ‖W − W0‖/‖W0‖)."""
    import lora_core as lc

    each = [(*lc.drift(w, k), k.numel(), float(k.double().norm())) for w, k in zip(weights, kept, strict=True)]
    numbers, total = sum(n for _, _, n, _ in each), sum(size**2 for *_, size in each)
    return sum(c * n for c, _, n, _ in each) / numbers, (sum((d * s) ** 2 for _, d, _, s in each) / total) ** 0.5


def judge(rows: Sequence[Row]) -> tuple[str, str]:
    """Quick: clearly quicker than loading another copy, in both precisions. Recovered: every bit of W0 is back."""
    paper = by(rows, way=WAYS[0])
    quick = every(_below(r["ms"], r["load_ms"]) for r in paper)
    exact = all(r["entries_changed"] == 0 for r in paper)
    f, b = (by(paper, dtype=d)[0] for d in ("float32", "bfloat16"))
    kept, off = (by(rows, way=w, dtype="float32")[0] for w in WAYS[1:])
    lost = "; W0 comes back to the bit" if exact else (
        f", but W0 does not come back: after {f['switches']} switches {f['entries_changed']:.0%} of its entries"
        f" differ by {f['drift']:.1e} of its size in float32, {b['entries_changed']:.0%} by {b['drift']:.1e} in"
        " bfloat16")  # fmt: skip
    return verdict([quick, exact]), (
        f"Subtracting and adding takes {_ms(f)} ms, where loading another copy takes {f['load_ms']:.0f}{lost}."
        f" Putting kept bits back is exact, in {_ms(kept)} ms and for {kept['bytes_kept'] / 1e6:,.1f} MB; unmerged a"
        f" switch takes {median(off['ms'])[0]:.3f} ms and moves nothing."
    )


def _below(times: Sequence[float], bound: float) -> bool | None:
    """Whether the median is below the bound; None where its interval does not say."""
    _, low, high = median(times)
    return True if high < bound else False if low >= bound else None


def _ms(row: Row) -> str:
    middle, low, high = median(row["ms"])
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


EXPERIMENT = Experiment(
    name="switch",
    question="To switch tasks W0 is recovered by subtracting BA, then B'A' is added. Is that quick, and is it W0?",
    section="4.1",
    claim="Recovering W0 by subtracting BA and then adding a different B'A' is a quick operation with very little"
          " memory overhead.",
    choices=("Quick, and W0 comes back exactly.",
             "Quick, but each switch leaves rounding errors in W0.",
             "Not quick: it costs about as much as loading another model."),
    answer=0,
    paper={"numbers": "none; a statement of section 4.1"},
    run=run,
    judge=judge,
)  # fmt: skip
