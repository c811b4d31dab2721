"""All that is fuzzed, by name, and how: `fuzz("zip", 500, folder)` makes so many cases and fails with the first that
does what it may not.

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
import time
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


def fuzz(
    name: str, count: int, folder: Path, *, begin: int = 0, until: float | None = None, kit: Kit | None = None
) -> dict[str, float]:
    """{"cases", "seconds", "slowest_s"}. begin: the seed; until: a time of `time.monotonic` to end at."""
    target, kit = TARGETS[name], kit or Kit(folder)
    folder.mkdir(parents=True, exist_ok=True)
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

    with watched(folder, programs=("/bin/true",)):  # stands in for an experiment's process
        each()
    return {"cases": cases, "seconds": time.monotonic() - began, "slowest_s": slowest}


def rounds(name: str, count: int, seconds: float, begin: int) -> dict[str, float]:
    """Many cases in rounds of a thousand, until there are enough or the time is over."""
    until = time.monotonic() + seconds
    total = {"cases": 0, "seconds": 0.0, "slowest_s": 0.0}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        os.environ["LORA_LAB_HOME"] = str(Path(folder) / "home")
        while total["cases"] < count and time.monotonic() < until:
            found = fuzz(name, min(ROUND, count), Path(folder) / str(begin), begin=begin, until=until)
            total = {"cases": total["cases"] + found["cases"], "seconds": total["seconds"] + found["seconds"],
                     "slowest_s": max(total["slowest_s"], found["slowest_s"])}  # fmt: skip
            begin += 1
    return {k: round(v, 2) for k, v in total.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="targets: " + ", ".join(TARGETS))
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all when none is named")
    parser.add_argument("--times", type=int, default=10_000, help="cases of each target")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of each target, at most")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if unknown := [n for n in given.targets if n not in TARGETS]:
        parser.error(f"no target {unknown[0]!r}; there are: {', '.join(TARGETS)}")
    os.environ |= {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    logging.disable(logging.CRITICAL)
    import torch

    torch.set_num_threads(1)
    figures = {}
    for name in given.targets or TARGETS:
        figures[name] = rounds(name, given.times, given.seconds, given.seed * 1000)
        print(f"{name}: {figures[name]}", file=sys.stderr, flush=True)
    print(json.dumps({"times": given.times, **figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
