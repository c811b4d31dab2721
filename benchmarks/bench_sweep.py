"""A sweep on one base against as many runs of ours, each a command of its own.

python -m benchmarks.bench_sweep [--steps 60] [--repeats 1]
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.kit import DATA, MODEL, in_turn, record

RANKS = (1, 2, 4, 8, 16, 64)


def run(steps: int, repeats: int) -> None:
    cli = str(Path(sys.executable).parent / "lora-lab")
    common = ["--model", MODEL, "--data", str(DATA / "e2e_valid.txt"), "--steps", str(steps), "--json"]
    losses: dict[str, dict[int, float]] = {"sweep": {}, "alone": {}}

    def call(*words: str) -> dict[str, Any]:
        done = subprocess.run([cli, *words, *common], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    def together() -> float:
        at = time.perf_counter()
        for r in call("sweep", "--ranks", ",".join(map(str, RANKS)))["runs"]:
            losses["sweep"][r["rank"]] = r["loss_after"]
        return time.perf_counter() - at

    def apart() -> float:
        at = time.perf_counter()
        for rank in RANKS:
            losses["alone"][rank] = call("train", "--rank", str(rank))["loss_after"]
        return time.perf_counter() - at

    values = in_turn({"ours": together, "six runs": apart}, repeats)
    record("sweep", f"ranks {', '.join(map(str, RANKS))}, {steps} steps each, as commands", values, peer="six runs",
           unit="s", reach=0.8, at_least=False, more={"losses": losses})  # fmt: skip


if __name__ == "__main__":
    given = sys.argv[1:]

    def option(name: str, default: int) -> int:
        return int(given[given.index(name) + 1]) if name in given else default

    run(option("--steps", 60), option("--repeats", 1))
