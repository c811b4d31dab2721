"""A worker whose experiment measures nothing, for tests: `python -m tests.experiment_kit HOME NAME [--quick]`.

It is the worker of the page with another `run`: cells that wait, of rows like those of the real one. How long a cell
waits is EXPERIMENT_CELL_S; what was made is appended to HOME/made.txt.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_core.experiments import Cell, Lab, objective

STAND_IN = (sys.executable, "-m", "tests.experiment_kit")
GOALS = ("lm", "classify", "preference")


def run(lab: Lab) -> list[dict[str, Any]]:
    if os.environ.get("EXPERIMENT_FAILS"):
        raise RuntimeError("the wheel came off\nof the wagon")

    def of(goal: str, seed: int) -> dict[str, Any]:
        for i in range(10):
            lab.at(i / 10)
            time.sleep(float(os.environ.get("EXPERIMENT_CELL_S", "0.02")) / 10)
        with open(Path(os.environ["LORA_LAB_HOME"]) / "made.txt", "a") as f:
            f.write(f"{goal} {seed}\n")
        return {"objective": goal, "seed": seed, "before": 2.0 + seed / 10, "after": 1.0, "steps": 7}

    lab.use("writer")
    return list(lab.run([Cell(f"{g} {s}", lambda g=g, s=s: of(g, s)) for g in GOALS for s in lab.seeds]).values())


def main() -> int:
    from app.runs import experiment_worker

    objective.EXPERIMENT = replace(objective.EXPERIMENT, run=run)
    return experiment_worker.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
