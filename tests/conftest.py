"""What all tests share: no network, few threads, and a loud word when the browser tests cannot run."""

from __future__ import annotations

import os
import re
import sys

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.browser_path import browser_path  # noqa: E402


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """One thread for the tiny models: more only wait for each other. The tests of a real model take all there are."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(os.cpu_count() or 1 if "real" in request.node.path.name else 1)


SKIPPED = pytest.StashKey[int]()
GENERATED: dict[str, int] = {}  # how many cases hypothesis made for each test


def pytest_runtest_teardown(item: pytest.Item) -> None:
    statistics = getattr(item, "hypothesis_statistics", "")
    cases = sum(map(int, re.findall(r"(\d+) passing", statistics)))
    if cases:
        GENERATED[item.nodeid] = cases


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a browser its tests are skipped on a person's machine, and fail where CI=true."""
    wanted = [item for item in items if item.get_closest_marker("browser")]
    if not wanted or browser_path():
        return
    if os.environ.get("CI") == "true":
        raise pytest.UsageError("no browser found: in CI the browser tests must run (scripts/browser.sh gets one)")
    config.stash[SKIPPED] = len(wanted)
    for item in wanted:
        item.add_marker(pytest.mark.skip(reason="no browser found"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    count = config.stash.get(SKIPPED, 0)
    if count:
        terminalreporter.section("BROWSER TESTS SKIPPED", red=True)
        terminalreporter.line(f"{count} browser tests did not run: no Chromium was found.")
        terminalreporter.line("`make browser` installs one, or set LORA_LAB_CHROMIUM to the one you have.")
    if GENERATED:
        terminalreporter.line(f"{sum(GENERATED.values()):,} generated cases in {len(GENERATED)} property tests")
