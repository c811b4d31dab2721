"""What the tests of the command line share: rows, a short training, and what an answer must look like."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Call = Callable[..., tuple[int, str, str]]
FOODS = ("good", "odd")
ROWS = "\n".join(f"name : Place {i} | food : {f}||Place {i} serves {f} food." for i in range(20) for f in FOODS)


def short(tiny: Path, rows: Path, *more: object) -> tuple[object, ...]:
    """A training of four steps."""
    return ("train", "--model", tiny, "--data", rows, "--steps", 4, "--batch-size", 4, "--rank", 2, "--lr", 0.05,
            "--dtype", "float32", *more)  # fmt: skip


def only_json(out: str) -> dict[str, Any]:
    """The one JSON object that standard output holds, and nothing else."""
    assert out.count("\n") == 1 and out.endswith("\n")
    value = json.loads(out)
    assert isinstance(value, dict)
    return value


def wrong(result: tuple[int, str, str], words: str) -> None:
    """Exit status 2, nothing on standard output, one line on standard error."""
    status, out, err = result
    assert status == 2, err
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("lora-lab: ") and words in last
    assert "Traceback" not in err
