"""A short load on a server of its own while it trains; `python -m benchmarks.soak load` has ten minutes of it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load import Server, faults, load
from tests.model_folder import tiny_llama

SOON_MS = 30_000  # only a hang takes so long: the processors may be others' meanwhile


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    home: Path = tmp_path_factory.mktemp("load")
    model = str(tiny_llama(home / "tiny"))
    server = Server(home, model, stand_in=True)
    try:
        with ThreadPoolExecutor(1) as pool:  # it needs a loop of its own, and a browser's may run in this thread
            yield pool.submit(lambda: load(server, model, people=8, seconds=5, arrivals=30, sessions=2000, sessions_s=9,
                                           assets=4)).result()  # fmt: skip
    finally:
        server.stop()
    assert not [line for line in server.said if "Traceback" in line], "".join(server.said)[-2000:]


def test_nothing_is_wrong_lost_or_somebody_else_s(figures: dict[str, Any]) -> None:
    assert faults(figures) == []
    assert figures["people"]["tagged"] >= 8 and figures["trained_steps"] >= 1


def test_thirty_arrivals_in_one_second_are_all_let_in(figures: dict[str, Any]) -> None:
    assert figures["arrivals"]["ms"]["page"]["n"] == 30
    assert figures["arrivals"]["ms"]["page"]["p95"] < SOON_MS and figures["people"]["ms"]["run"]["p95"] < SOON_MS


def test_sessions_leave_nothing_behind(figures: dict[str, Any]) -> None:
    used = figures["sessions"]
    assert used["sessions"] >= 1
    assert used["descriptors"]["last"] <= used["descriptors"]["first"] + 12
    assert used["threads"]["last"] <= used["threads"]["first"] + 20
    assert used["MB"]["last"] <= used["MB"]["first"] + 60
