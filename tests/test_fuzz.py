"""Some cases of each kind; `python -m benchmarks.soak fuzz` makes ten thousand."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from app.pages import held
from tests.fuzz import TARGETS, fuzz
from tests.fuzz_files import Kit


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_LAB_HOME", str(folder / "home"))
        yield Kit(folder)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(held, "IDLE_S", 0.0)
    for thread in threading.enumerate():  # one that computes while the interpreter ends brings it down
        if thread.name in ("held", "besides", "compare"):
            thread.join(20)
    monkey.undo()


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_that_is_given_breaks_it(name: str, kit: Kit) -> None:
    found = fuzz(name, TARGETS[name].short, kit.root, kit=kit)
    assert found["cases"] >= TARGETS[name].short // 2
