"""What takes minutes to find out: `python -m benchmarks.soak [PART …]`, every part when none is named (`make soak`).

A part is a command that prints a JSON object with its figures on its last line, and fails where something is not as it
must be. Each run of a part adds one line to results/soak PART.jsonl: its figures, how long it took, and the machine;
with what was wrong, where it failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from benchmarks.kit import RESULTS, ROOT, child, machine

LONGEST_S = 4 * 3600.0  # of a part
# part: (what it does, module, its arguments)
PARTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "kills": (
        "kill -9 of servers and workers at random moments, with checkpoints of 12 MB",
        "tests.kills",
        ("queue", "--times", "150", "--seconds", "230"),
    ),
    "cuts": (
        "the power goes between any two writes of a training, of making, importing and deleting a run",
        "tests.kills",
        ("cuts", "--times", "270", "--seconds", "230"),
    ),
    "kills-training": (
        "kill -9 and power cuts in the library's own training of a tiny model, bit for bit",
        "tests.kills",
        ("real", "--times", "100", "--seconds", "600"),
    ),
    "load": (
        "30 arrivals in a second, then a room of 30 people and 5 browsers for ten minutes, while it trains",
        "benchmarks.load",
        ("--seconds", "600", "--sessions", "0"),
    ),
    "sessions": (
        "2,000 sessions one after another, while it trains",
        "benchmarks.load",
        ("--seconds", "1", "--people", "0", "--browsers", "0", "--arrivals", "0", "--sessions", "2000",
         "--sessions-s", "1800"),  # fmt: skip
    ),
}

# Each kind of what nobody expects is a part of its own, so that some can be made side by side.
FUZZED = ("data", "adapter", "single file", "header", "zip", "configuration", "form", "call", "stream")
for _name in FUZZED:
    PARTS[f"fuzz-{_name.replace(' ', '-')}"] = (
        f"ten thousand cases of: {_name}",
        "tests.fuzz",
        ("--times", "10000", _name),
    )


def soak(name: str, seed: int) -> bool:
    """Run one part and write its line; whether all was as it must be."""
    what, module, arguments = PARTS[name]
    began = time.monotonic()
    more = () if "--seed" in arguments or not seed else ("--seed", str(seed))
    failed = ""
    try:
        figures = child(module, *arguments, *more, timeout=LONGEST_S)
    except RuntimeError as error:
        figures, failed = getattr(error, "figures", {}), str(error)
        print(f"soak {name}: {failed}", file=sys.stderr, flush=True)
    line = {"row": f"soak {name}", "what": what, "command": [module, *arguments, *more], "figures": figures,
            "seconds": round(time.monotonic() - began, 1), "machine": machine(),
            **({"failed": failed} if failed else {})}  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(line).replace(sys.prefix, ".venv").replace(str(ROOT), ".")  # no machine's paths
    with (RESULTS / f"soak {name}.jsonl").open("a") as f:
        f.write(text + "\n")
    print(f"soak {name}: {json.dumps(figures)}", flush=True)
    return not failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description="parts: " + ", ".join(PARTS))
    parser.add_argument("parts", nargs="*", metavar="PART", help="all when none is named")
    parser.add_argument("--seed", type=int, default=0, help="other random moments")
    given = parser.parse_args(arguments)
    if unknown := [n for n in given.parts if n not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; there are: {', '.join(PARTS)}")
    return 0 if all([soak(name, given.seed) for name in given.parts or PARTS]) else 1


if __name__ == "__main__":
    sys.exit(main())
