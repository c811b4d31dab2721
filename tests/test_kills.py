"""Nothing is lost: short forms of tests/kills.py, and what it cannot reach. `make soak` has the long ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.runs_kit import ROOT


def kills(part: str, *more: object) -> dict[str, Any]:
    """Run tests.kills in a process of its own; its figures. What is not as it must be fails there."""
    command = [sys.executable, "-m", "tests.kills", part, *map(str, more)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_servers_and_workers_are_killed_at_any_moment() -> None:
    figures = kills("queue", "--times", 8, "--seconds", 20, "--seed", 3)
    assert figures["kills"] >= 6 and figures["finished"] >= 1, figures


def test_the_power_goes_between_any_two_writes() -> None:
    figures = kills("cuts", "--times", 30, "--seconds", 20, "--seed", 1)
    assert figures["kills"] >= 20, figures


@pytest.mark.slow
def test_the_librarys_own_training_is_killed_and_goes_on_to_the_bit() -> None:
    figures = kills("real", "--times", 24, "--seconds", 200)
    assert figures["killed"] >= 8 and figures["cuts"] >= 4, figures
