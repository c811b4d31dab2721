"""Some cases of each kind; `python -m benchmarks.soak fuzz-data` makes ten thousand.

In a process of its own: what is watched there is all that the process does, and a browser's loop runs in ours.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak import FUZZED
from tests.fuzz import TARGETS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "tests.fuzz", "--times", "0"], cwd=ROOT, text=True, timeout=1200,
                          capture_output=True)  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines and lines[-1].startswith("{"), done.stderr[-4000:]
    return json.loads(lines[-1])


def test_all_of_it_is_soaked() -> None:
    assert tuple(TARGETS) == FUZZED


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", TARGETS)
def test_nothing_that_is_given_breaks_it(name: str, figures: dict[str, Any]) -> None:
    found = figures[name]
    assert "failed" not in found, found["failed"]
    assert found["cases"] >= TARGETS[name].short // 2
