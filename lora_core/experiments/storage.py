"""storage: is base + adapter not more than the whole model? Files and memory, measured beside their formulas."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.experiments.experiment import Experiment, Row
from lora_core.experiments.lab import Cell
from lora_core.experiments.verdicts import above, by, interval, verdict
from lora_core.spec import LoraSpec

if TYPE_CHECKING:
    from lora_core.experiments.lab import Lab

SPEC = LoraSpec(targets=("q", "v"), rank=8, alpha=16)
TASKS = (1, 2, 3, 5, 10, 30, 100)


def run(lab: Lab) -> list[Row]:
    """File sizes from files that are written, peaks from processes that train."""
    name = lab.use("writer")
    repeats = range(lab.choose(2, 5))
    cells = [Cell("files", lambda: _files(lab)),
             *(Cell(f"{m} {i}", lambda m=m: _peak(name, m), 2) for i in repeats for m in ("full", "lora"))]  # fmt: skip
    found = lab.run(cells)
    rows = [*found["files"]["rows"]]
    base, adapter = found["files"]["base"], found["files"]["adapter"]
    rows += [{"kind": "tasks", "tasks": n, "copies": n * base, "shared": base + n * adapter} for n in TASKS]
    rows += [{"kind": "peak", "method": m, "repeat": i, **found[f"{m} {i}"]} for i in repeats for m in ("full", "lora")]
    return rows


def _files(lab: Lab) -> dict[str, Any]:
    import lora_core as lc
    from lora_core.experiments.peak import BATCH
    from lora_core.experiments.training import detach_all

    model, tokenizer = lab.writer()
    task = lc.load_task("restaurant", train=BATCH, test=1)
    items = lc.CausalLM(model, tokenizer, task.template).encode(task.train)
    tokens = max(len(e) for e in items) * len(items)
    b = lc.budget(model, SPEC, tokens=tokens, labelled=sum(len(e) - e.start for e in items))
    base = sum(f.stat().st_size for f in Path(model.lora_lab.folder).glob("*.safetensors"))
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = lc.attach(model, SPEC, "storage").save(Path(folder) / "adapter")
            adapter = (made / "adapter_model.safetensors").stat().st_size
    finally:
        detach_all(model)
    rows: list[Row] = [{"kind": "file", "what": "a full copy", "bytes": base, "formula": b.full_bytes},
                       {"kind": "file", "what": "an adapter", "bytes": adapter, "formula": b.file_bytes}]  # fmt: skip
    for method, memory in (("full", b.full_memory), ("lora", b.memory)):
        parts = {p: getattr(memory, p) for p in ("weights", "gradients", "optimiser", "activations", "copies")}
        rows.append({"kind": "memory", "method": method, **parts, "total": memory.total})
    return {"rows": rows, "base": base, "adapter": adapter}


def _peak(name: str, method: str) -> dict[str, int]:
    done = subprocess.run([sys.executable, "-m", "lora_core.experiments.peak", name, method], capture_output=True,
                          text=True)  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {method} training failed: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def judge(rows: Sequence[Row]) -> tuple[str, str]:
    """Storage is arithmetic on measured sizes; memory is the difference of measured peaks."""
    tasks = {r["tasks"]: r for r in by(rows, kind="tasks")}
    full, lora = ([float(r["peak"]) for r in by(rows, kind="peak", method=m)] for m in ("full", "lora"))
    smaller = all(r["shared"] < r["copies"] for n, r in tasks.items() if n > 1)
    lighter = above([a - b for a, b in zip(full, lora, strict=True)])
    one, many = (tasks[n]["shared"] / tasks[n]["copies"] for n in (1, 100))
    more = ("from the second task on it is less" if smaller else "from the second task on it is not always less")
    a, b = interval(full)[0], interval(lora)[0]
    return verdict([smaller, lighter]), (
        f"For one task base and adapter are {one:.2%} of a copy of the model, so yes, more; {more}: for 100 tasks"
        f" {many:.2%} of 100 copies. Training peaked at {b / 1e6:,.0f} MB instead of {a / 1e6:,.0f} MB of full"
        f" fine-tuning, {a / b:.1f} times less."
    )


EXPERIMENT = Experiment(
    name="storage",
    question="LoRA needs the frozen weights and the low-rank ones. Is that not more than 100 % of the model?",
    section="4.2",
    claim="Checkpoints shrink by about 10,000 times, so a hundred tasks need little more than one model; training takes"
          " up to two thirds less memory, since no optimiser states are kept for frozen weights.",
    choices=("It is more for any number of tasks; the gain is only in training.",
             "It is more for one task and less from the second on; training takes less memory at once.",
             "It is less from the first task on."),
    answer=1,
    paper={"model": "GPT-3 175B", "checkpoint": "350 GB -> 35 MB (r = 4; q, v)", "100 tasks": "35 TB -> 354 GB",
           "training memory": "1.2 TB -> 350 GB"},
    run=run,
    judge=judge,
)  # fmt: skip
