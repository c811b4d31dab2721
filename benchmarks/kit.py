"""What the benchmarks share: the machine in words, both sides in turn, one JSON line for each row.

A row is measured several times, ours and the other side alternately, each in a process of its own where memory or a
cold start matters. Its line in `results/<row>.jsonl` has all values, their medians and spread, the ratio pair by pair,
what was to be reached, and the machine, versions and commit.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
DATA = ROOT.parent / "shared" / "data"
MODEL = "smollm2-135m"
Side = Callable[[], float]


def machine() -> dict[str, Any]:
    """Chip, instruction sets that matter for matrix products, versions and commit."""
    import torch

    from lora_core.machine import fingerprint

    return {
        **fingerprint(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "versions": {n: _version(n) for n in ("transformers", "peft", "accelerate", "numpy", "gradience")},
        "python": sys.version.split()[0],
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest of a figure, and how often it was measured."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def in_turn(sides: Mapping[str, Side], repeats: int, warmup: int = 0) -> dict[str, list[float]]:
    """{side: values}: A B A B …, so that a machine that slows down slows both."""
    got: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(warmup + repeats):
        for name, side in sides.items():
            value = side()
            if i >= warmup:
                got[name].append(value)
    return got


def seconds(work: Callable[[], Any]) -> float:
    at = time.perf_counter()
    work()
    return time.perf_counter() - at


def child(module: str, *args: str, timeout: float = 3000) -> dict[str, Any]:
    """Run `python -m module args` and read the JSON object on its last line. RuntimeError where it fails, with that
    object as `figures` if there was one."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", module, *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=env)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode:
        error = RuntimeError(f"{module} {' '.join(args)} failed:\n{done.stderr[-3000:]}")
        with suppress(ValueError):
            error.figures = json.loads(last)  # type: ignore[attr-defined]
        raise error
    return json.loads(last)


def record(row: str, what: str, values: Mapping[str, Sequence[float]], *, ours: str = "ours", peer: str, unit: str,
           reach: float, at_least: bool = True, more: Mapping[str, Any] | None = None) -> dict[str, Any]:  # fmt: skip
    """Write and print one line. The ratio is peer/ours where more is better (at_least), else ours/peer; the median of
    the pairs."""
    pairs = [(p / o if at_least else o / p) for o, p in zip(values[ours], values[peer], strict=False)]
    ratio = spread(pairs)
    line = {
        "row": row,
        "what": what,
        "unit": unit,
        "sides": {name: spread(v) for name, v in values.items()},
        "ours": ours,
        "peer": peer,
        "ratio": ratio,
        "reach": reach,
        "at_least": at_least,
        "reached": ratio["median"] >= reach if at_least else ratio["median"] <= reach,
        "values": {name: list(v) for name, v in values.items()},
        **(more or {}),
        "machine": machine(),
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{row}.jsonl").open("a") as f:
        f.write(json.dumps(line) + "\n")
    sides = ", ".join(
        f"{n} {s['median']:.4g} {unit} [{s['min']:.4g}, {s['max']:.4g}]" for n, s in line["sides"].items()
    )
    mark = "reached" if line["reached"] else "NOT reached"
    print(f"{row}: {sides}; ratio {ratio['median']:.2f} [{ratio['min']:.2f}, {ratio['max']:.2f}], "
          f"{'≥' if at_least else '≤'} {reach:g} {mark}", flush=True)  # fmt: skip
    return line


class Peak:
    """Largest resident size since the start of the block, above what it was then, in bytes (Linux)."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = _status("VmHWM") - self.before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
