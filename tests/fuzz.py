"""All that is fuzzed, by name, and how: `fuzz("zip", 500, Kit(folder))` makes so many cases, and fails with the first
that does what it may not.

`python -m tests.fuzz --times 10000 [--seconds 200] [TARGET …]` makes them in rounds, each with a seed of its own, and
prints a JSON object on its last line.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests import fuzz_adapters, fuzz_api, fuzz_containers, fuzz_files
from tests.fuzz_files import Kit
from tests.fuzz_watch import bounded, watched

ROUND = 1000


@dataclass(frozen=True)
class Target:
    """A strategy for cases and what is done with each.

    short  how many cases the tests make
    ready  what is imported and made before the first, so that no case pays for it
    """

    cases: st.SearchStrategy[Any]
    check: Callable[[Any, Kit], None]
    short: int
    ready: Callable[[Kit], Any] = lambda kit: kit.tokenizer


TARGETS = {
    "data": Target(fuzz_files.data_cases(), fuzz_files.data_file, 50),
    "adapter": Target(fuzz_adapters.adapter_cases(), fuzz_adapters.adapter, 60, lambda kit: kit.model),
    "single file": Target(fuzz_adapters.single_cases(), fuzz_adapters.single, 60),
    "header": Target(fuzz_containers.header_cases(), fuzz_containers.header, 80),
    "zip": Target(fuzz_containers.zip_cases(), fuzz_containers.zipped, 25),
    "configuration": Target(fuzz_containers.config_cases(), fuzz_containers.config, 12, lambda kit: kit.model),
    "form": Target(fuzz_api.form_cases(), fuzz_api.form, 60),
    "call": Target(fuzz_api.call_cases(), fuzz_api.call, 80, fuzz_api.ready),
    "stream": Target(fuzz_api.stream_cases(), fuzz_api.stream, 12, fuzz_api.ready),
}


def fuzz(name: str, count: int, kit: Kit, *, begin: int = 0, until: float | None = None) -> dict[str, float]:
    """{"cases", "seconds", "slowest_s"}. begin: the seed; until: a time of `time.monotonic` to end at."""
    target = TARGETS[name]
    target.ready(kit)
    cases, slowest, began = 0, 0.0, time.monotonic()

    @seed(begin)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
        phases=(Phase.generate, Phase.shrink) if until is None else (Phase.generate,),
    )
    @given(target.cases)
    def each(case: Any) -> None:
        nonlocal cases, slowest
        if until is not None and time.monotonic() > until:
            return  # hypothesis has no word for enough
        at = time.process_time()
        with bounded():
            target.check(case, kit)
        cases, slowest = cases + 1, max(slowest, time.process_time() - at)

    with watched(kit.root, programs=("/bin/true",)):  # stands in for an experiment's process
        each()
    return {"cases": cases, "seconds": time.monotonic() - began, "slowest_s": slowest}


def rounds(name: str, count: int, seconds: float, begin: int, kit: Kit) -> dict[str, float]:
    """Many cases in rounds of a thousand, until there are enough or the time is over; with a count of 0 the few of the
    tests, and what fails is made small."""
    if count == 0:
        return fuzz(name, TARGETS[name].short, kit, begin=begin)
    until = time.monotonic() + seconds
    total = {"cases": 0, "seconds": 0.0, "slowest_s": 0.0}
    while total["cases"] < count and time.monotonic() < until:
        found = fuzz(name, min(ROUND, count), kit, begin=begin, until=until)
        total = {"cases": total["cases"] + found["cases"], "seconds": total["seconds"] + found["seconds"],
                 "slowest_s": max(total["slowest_s"], found["slowest_s"])}  # fmt: skip
        begin += 1
    return {k: round(v, 2) for k, v in total.items()}


def still() -> None:
    """Wait for what the page's calls began: a thread that computes while the interpreter ends brings it down."""
    from app.pages import held

    held.IDLE_S = 0.0
    for thread in threading.enumerate():
        if thread.name in ("held", "besides", "compare"):
            thread.join(20)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="targets: " + ", ".join(TARGETS))
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all when none is named")
    parser.add_argument("--times", type=int, default=10_000, help="cases of each target; 0: as many as the tests make")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of each target, at most")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if unknown := [n for n in given.targets if n not in TARGETS]:
        parser.error(f"no target {unknown[0]!r}; there are: {', '.join(TARGETS)}")
    os.environ |= {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    logging.disable(logging.CRITICAL)
    import torch

    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as folder:
        os.environ["LORA_LAB_HOME"] = str(Path(folder) / "home")  # one for all: what serves a page lives on
        kit = Kit(Path(folder))
        for name in given.targets or TARGETS:
            try:
                figures[name] = rounds(name, given.times, given.seconds, given.seed * 1000, kit)
            except Exception:  # hypothesis's, with the case in its notes: the other targets go on
                text = traceback.format_exc()
                figures[name] = {"failed": text if len(text) < 6000 else f"{text[:4000]} … {text[-2000:]}"}
            print(f"{name}: {figures[name]}", file=sys.stderr, flush=True)
        still()
    print(json.dumps({"times": given.times, **figures}))
    return int(any("failed" in f for f in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
