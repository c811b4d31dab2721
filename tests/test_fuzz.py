"""Some cases of each kind; `python -m benchmarks.soak fuzz` makes ten thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import TARGETS, fuzz


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_that_is_given_breaks_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_LAB_HOME", str(tmp_path / "home"))
    found = fuzz(name, TARGETS[name].short, tmp_path)
    assert found["cases"] >= TARGETS[name].short // 2
