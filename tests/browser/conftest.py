"""A real server on the real default model, and a browser that reports what it should not have done.

Every test's page fails it on an error in the console, on an exception, and on a request to anywhere but the server.
Pictures of the page are written to tests/browser/screens, where a person can look at them (LORA_LAB_SCREENS names
another folder); tests/browser/pictures.py makes those of the README.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright

from tests.browser_path import browser_path
from tests.model_folder import link_models

ROOT = Path(__file__).parent.parent.parent
SCREENS = Path(os.environ.get("LORA_LAB_SCREENS") or Path(__file__).parent / "screens").absolute()
WIDE: ViewportSize = {"width": 1280, "height": 720}
NARROW: ViewportSize = {"width": 390, "height": 844}
SLOW = 240_000  # ms: only something that hangs takes so long
SMALL = {"steps": 12, "batch_size": 2, "eval_rows": 4, "max_tokens": 64, "seed": 0}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in Path(item.path).parents:
            item.add_marker("browser")
            item.add_marker(pytest.mark.timeout(600))


class Server:
    """`lora-lab serve` in a process of its own, on a folder of its own that shares the user's models."""

    def __init__(self, home: Path, *, module: str = "app.cli") -> None:
        self.home, self.module, self.url, self.port = home, module, "", 0
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        env = {**os.environ, "LORA_LAB_HOME": str(self.home), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", self.module, "serve", "--no-browser", "--port", str(self.port)]
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT)  # fmt: skip
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "LoRA Lab is at" in line:
                self.url = line.split()[4]
                self.port = int(self.url.rsplit(":", 1)[1])
                return
        raise AssertionError(f"the server ended with status {self.process.wait()} before it answered")

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def ask(self, name: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/lab/api/{name}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def ended(self, run: int) -> dict[str, Any]:
        """The run, once it is over."""
        for _ in range(SLOW // 500):
            view = self.ask(f"run?run={run}")
            if not view["live"]:
                return view
            time.sleep(0.5)
        raise AssertionError(f"run {run} does not end: {view['says']}")


def own_home(folder: Path) -> Path:
    """A folder for a server: without runs, but with the models that the user has already."""
    from lora_core.home import home_path

    link_models(folder)
    with suppress(OSError):  # how fast this machine is, so that it is not timed again
        shutil.copy(home_path() / "machine.json", folder)
    return folder


expect.set_options(timeout=30_000)  # a page waits its turn where tests run side by side


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(own_home(tmp_path_factory.mktemp("lab")))
    found.start()
    yield found
    for run in found.ask("runs")["runs"]:
        if run["status"] in ("queued", "running"):
            found.ask("stop", {"run": run["id"]})
            found.ended(run["id"])
    found.stop()


@pytest.fixture(scope="session")
def run(server: Server) -> int:
    """A finished run of some steps on the default model."""
    for known in server.ask("runs")["runs"]:
        if known["status"] == "done" and not known["recorded"]:
            return known["id"]
    body = {
        "model": "smollm2-135m",
        "spec": {"targets": ["q", "v"], "rank": 4},
        "config": SMALL,
        "data": {"task": "sentiment"},
    }
    answer = server.ask("train", body)
    assert "run" in answer, answer
    view = server.ended(answer["run"])
    assert view["status"] == "done", view["error"]
    return answer["run"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser: Browser, server: Server) -> Iterator[Callable[..., Page]]:
    """open_page("/?tab=train", size=NARROW, scheme="dark"): a page that is ready; faults are raised at the end."""
    faults: list[str] = []
    contexts = []

    def opened(path: str = "/?tab=adapt", *, size: Any = WIDE, scheme: Any = "light", offline_ok: bool = False) -> Page:
        context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SLOW)

        def console(message: Any) -> None:
            if message.type == "error" and not (offline_ok and "ERR_" in message.text):
                faults.append(f"console: {message.text}")

        def request(asked: Any) -> None:
            if not asked.url.startswith((server.url, "data:", "blob:")):
                faults.append(f"request to {asked.url}")

        page.on("console", console)
        page.on("pageerror", lambda error: faults.append(f"exception: {error}"))
        page.on("request", request)
        page.goto(server.url + path)
        ready(page)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not faults, "\n".join(faults)


def ready(page: Page) -> None:
    """Until the page has drawn itself and knows the rows that would be trained on."""
    page.wait_for_selector("#targets [data-name]", state="attached")
    page.wait_for_function("LoraLab.state.about && LoraLab.state.time")


def shoot(page: Page, name: str) -> None:
    """A picture for a person: all of the page where it is narrow, what a screen shows where it is wide."""
    SCREENS.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(400)
    page.screenshot(path=SCREENS / f"{name}.png", full_page=(page.viewport_size or WIDE)["width"] < 900)


def written(page: Page) -> None:
    """Until both texts of Compare stand there, and the tokens below them."""
    page.wait_for_function("document.querySelector('#adapted-output').ariaBusy === 'false' && "
                           "!document.querySelector('#compare-button').disabled")  # fmt: skip
    page.wait_for_function("document.querySelector('.cp-tok, .cp-detail .ll-note')")
