"""What all tests share: no network, few threads, and a loud word when the browser tests cannot run."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Generator
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads that wait for each other do so asleep: awake they keep the processors from the tests beside them. Two
    # trainings of a real model at a time took 150 s on two cores, and 33 s like this.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from tests.browser_path import browser_path  # noqa: E402


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """One thread for the tiny models: more only wait for each other. The tests of a real model take all there are."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(os.cpu_count() or 1 if "real" in request.node.path.name else 1)


NO_BROWSER = "no browser found"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Tells with the report how many cases hypothesis made for the test; the report may come from another process."""
    statistics = getattr(item, "hypothesis_statistics", "")
    if call.when == "call" and (cases := sum(map(int, re.findall(r"(\d+) passing", statistics)))):
        item.user_properties.append(("cases", cases))
    return (yield)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Which tests share a process: those of a file, since they share models; all of the browser, since they share a
    server."""
    from xdist.scheduler import LoadScopeScheduling

    class Sharing(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "browser" if nodeid.startswith("tests/browser/") else nodeid.partition("::")[0]

    return Sharing(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those of the browser come first, since they take longest. Without a browser they are skipped on a person's
    machine, and fail where CI=true."""
    items.sort(key=lambda item: item.path.parent.name != "browser")
    wanted = [item for item in items if item.get_closest_marker("browser")]
    if not wanted or browser_path():
        return
    if os.environ.get("CI") == "true":
        raise pytest.UsageError(f"{NO_BROWSER}: in CI the browser tests must run (scripts/browser.sh gets one)")
    for item in wanted:
        item.add_marker(pytest.mark.skip(reason=NO_BROWSER))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    stats = terminalreporter.stats
    if count := sum(NO_BROWSER in str(r.longrepr) for r in stats.get("skipped", ())):
        terminalreporter.section("BROWSER TESTS SKIPPED", red=True)
        terminalreporter.line(f"{count} browser tests did not run: no Chromium was found.")
        terminalreporter.line("`make browser` installs one, or set LORA_LAB_CHROMIUM to the one you have.")
    passed = [dict(r.user_properties) for r in stats.get("passed", ())]
    if cases := [p["cases"] for p in passed if "cases" in p]:
        terminalreporter.line(f"{sum(cases):,} generated cases in {len(cases)} property tests")
