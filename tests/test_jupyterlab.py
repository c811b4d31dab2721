"""The explorers in a real JupyterLab in a real browser: they draw, follow a hand, go on while the kernel is busy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Page, expect, sync_playwright

from tests.browser_path import browser_path

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.timeout(600)]

ROOT = Path(__file__).parent.parent
WAIT = 120_000  # ms: only something that hangs takes so long
CELLS = (
    """import time
import lora_core as lc
from tiny import filled, tiny
from tokenizer_fixture import tiny_tokenizer
from app.widgets import *
rows = [{"prompt": f"the fox {i}", "completion": f"jumps over dog {i} and it was not amused"} for i in range(20)]
task, tokenizer = lc.load_data(rows), tiny_tokenizer()
model = tiny("llama")
adapter = filled(lc.attach(model, lc.LoraSpec(rank=4), "mine"))""",
    "s = SpectrumExplorer(adapter); s",
    "d = RankDial(adapter, 'the fox 1', task, rows=2, tokens=4, tokenizer=tokenizer); d",
    "b = BudgetExplorer(tiny('llama')); b",
    "config = lc.TrainConfig(steps=10**6, batch_size=1, eval_rows=1, warmup=0)\n"
    "t = TrainWidget(tiny('llama'), lc.LoraSpec(rank=2), task, config, tokenizer=tokenizer); t",
    "p = Playground('bzero', r=2, t=150); p",
    "print('ready')",
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a JupyterLab on a folder with one notebook, as `make lab` starts it."""
    folder = tmp_path_factory.mktemp("lab")
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=[new_code_cell(c) for c in CELLS], metadata=kernel), folder / "all.ipynb")
    own = {f"JUPYTER_{n}_DIR": str(folder / n.lower()) for n in ("CONFIG", "DATA", "RUNTIME")}
    own |= {f"JUPYTERLAB_{n}_DIR": str(folder / n.lower()) for n in ("SETTINGS", "WORKSPACES")}
    own |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0", "--notebook-dir=.",
         "--ServerApp.allow_root=True", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
         "--LabApp.news_url=None"], cwd=folder, start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, **own})  # fmt: skip
    try:
        yield _address(folder / "runtime", process)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


def _address(runtime: Path, process: subprocess.Popen[bytes]) -> str:
    until = time.monotonic() + 90
    while time.monotonic() < until:
        assert process.poll() is None, "JupyterLab ended"
        for file in runtime.glob("jpserver-*.json"):
            info = json.loads(file.read_text())
            try:
                urllib.request.urlopen(f"{info['url']}api?token={info['token']}", timeout=2)
            except OSError:
                continue
            return f"{info['url']}lab/tree/all.ipynb?token={info['token']}"
        time.sleep(0.3)
    raise AssertionError("JupyterLab did not come up")


@pytest.fixture(scope="module")
def page(lab: str) -> Iterator[Page]:
    """The notebook, run from top to bottom."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 6000})
        page.set_default_timeout(WAIT)
        page.goto(lab)
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
        page.get_by_role("button", name="Python 3 (ipykernel) | Idle").wait_for()
        page.keyboard.press("Escape")
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        expect(cell(page, 6)).to_contain_text("ready", timeout=WAIT)
        yield page
        browser.close()


def cell(page: Page, n: int) -> Any:
    """The output of the n-th cell."""
    return page.locator(".jp-Notebook .jp-CodeCell").nth(n).locator(".jp-OutputArea-output").last


def begin(page: Page, code: str) -> Any:
    """Run this code in the last cell; gives the place of its output."""
    last = page.locator(".jp-Notebook .jp-CodeCell").last
    last.locator(".cm-content").click()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.insert_text(code)
    page.keyboard.press("ControlOrMeta+Enter")
    return last.locator(".jp-OutputArea-output").last


def ask(page: Page, code: str) -> str:
    """What the kernel prints for this code."""
    stamp = f"asked {time.monotonic()}"
    out = begin(page, f"{code}; print({stamp!r})")
    expect(out).to_contain_text(stamp, timeout=WAIT)
    return out.inner_text().split(stamp)[0].strip()


def test_every_explorer_is_drawn(page: Page) -> None:
    for n in (1, 2, 3, 4):
        expect(cell(page, n).locator(".js-plotly-plot").first).to_be_visible(timeout=WAIT)
    expect(cell(page, 5).locator("canvas").first).to_be_visible(timeout=WAIT)
    expect(cell(page, 1)).to_contain_text("hold 90 % of Σσ²")
    expect(cell(page, 3)).to_contain_text("trainable parameters")


def test_a_hand_on_the_controls_reaches_the_kernel_and_the_figure(page: Page) -> None:
    c = cell(page, 1)
    c.get_by_role("button", name="q", exact=True).click()
    expect(c).to_contain_text("layer", timeout=WAIT)
    assert ask(page, "print(s.result().target)") == "q"
    b = cell(page, 3)
    before = b.locator("p").inner_text()
    b.get_by_role("button", name="up", exact=True).click()
    expect(b.locator("p")).not_to_have_text(before)
    assert ask(page, "print(b.spec.targets)") == "('q', 'v', 'up')"
    ask(page, "d.rank.value = 1")
    expect(cell(page, 2)).to_contain_text("Rank 1 of 4")


def test_stop_works_while_the_kernel_trains_and_an_interrupt_where_a_cell_waits(page: Page) -> None:
    c = cell(page, 4)
    c.get_by_role("button", name="Train").click()
    expect(c).to_contain_text("step", timeout=WAIT)
    expect(c.get_by_role("button", name="Stop")).to_be_enabled()
    assert int(ask(page, "time.sleep(2); print(len(t.events))")) > 2, "the kernel answers while it trains"
    c.get_by_role("button", name="Stop").click()
    expect(c).to_contain_text("stopped after step", timeout=WAIT)
    assert ask(page, "print(t.result().reason)") == "stopped"
    out = begin(page, "print('reason', t.start().wait().reason)")
    expect(c.get_by_role("button", name="Stop")).to_be_enabled()
    page.get_by_role("button", name="Interrupt the kernel").click()
    expect(out).to_contain_text("reason stopped", timeout=WAIT)


def test_play_plays_while_the_kernel_is_busy_and_its_result_is_what_is_shown(page: Page) -> None:
    c = cell(page, 5)
    slept = begin(page, "time.sleep(8); print('slept')")
    c.get_by_role("button", name="Back to the start").click()
    expect(c.locator(".pg-at")).to_have_text("step 0 of 150")
    c.get_by_role("button", name="play", exact=True).click()
    expect(c.locator(".pg-at")).to_have_text("step 150 of 150", timeout=WAIT)
    expect(slept).to_contain_text("slept", timeout=WAIT)
    shown = c.locator(".pg-live").inner_text().split("loss ")[1].split(" ")[0]
    assert float(ask(page, "print(p.result().loss[-1])")) == pytest.approx(float(shown), rel=0.006)
    c.get_by_label("start", exact=True).select_option("none")
    expect(c.locator(".pg-say")).to_contain_text("both zero")
    assert ask(page, "print(p.toy.init, p.result().loss[-1])") == "none 1.0"
    ask(page, "p.query = {'p': 'lowrank', 'r': '4', 't': '120'}")
    expect(c.locator(".pg-at")).to_have_text("step 120 of 120")
    expect(c.locator(".pg-say")).to_contain_text("Rank 4 cannot pass 0.5")


def test_pictures(page: Page) -> None:
    folder = os.environ.get("LORA_LAB_SCREENS")
    if not folder:
        pytest.skip("LORA_LAB_SCREENS names no folder for them")
    Path(folder).mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(Path(folder) / "jupyterlab.png"))
