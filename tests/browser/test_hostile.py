"""A server for others, in the browser: who comes in; and names, rows, prompts and cells that are up to no good."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from app.runs.run import RunRequest
from app.runs.store import RunStore
from tests.browser.conftest import ROOT, SLOW, own_home, ready, shoot

EVIL = "<img src=x onerror=window.bad=1>"
ROWS = "".join(f"{EVIL} {i}||<script>window.bad=2</script> {i}\n" for i in range(12))
NEXT = "a.k('$')}{{constructor.constructor('window.bad=3')()}} ${window.bad=4} javascript:window.bad=5"


def evil_run(home: Path) -> int:
    """A finished run whose title, file and error are HTML, with the recorded adapter."""
    store = RunStore(home)
    data = home / f"{EVIL.replace('/', '')}.txt"
    data.write_text(ROWS)
    recorded = store.recorded()
    assert recorded is not None and recorded.adapter is not None
    request = RunRequest(model="smollm2-135m", data=str(data), title=EVIL, spec=recorded.request.spec,
                         config=recorded.request.config)  # fmt: skip
    run = store.create(request)
    shutil.copytree(recorded.adapter, run.folder / "adapter")
    shutil.copy(recorded.folder / "events.jsonl", run.folder)
    store.claim(run.id)
    store.finish(run.id, "done", step=80, base_loss=3.0, loss=2.0, adapter=True, error=EVIL,
                 result={"objective": "lm", "trainable": 460800})  # fmt: skip
    store.close()
    return run.id


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """(the printed link, the run)."""
    home = own_home(tmp_path_factory.mktemp("others"))
    run = evil_run(home)
    command = [sys.executable, "-m", "app.cli", "serve", "--no-browser", "--host", "127.0.0.2", "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env={**os.environ, "LORA_LAB_HOME": str(home), "PYTHONUNBUFFERED": "1"})  # fmt: skip
    assert process.stdout is not None
    link = next(line.split()[4] for line in process.stdout if "LoRA Lab is at" in line)
    yield link, run
    process.terminate()
    process.wait(30)


@pytest.fixture
def page(browser: Browser, served: tuple[str, int]) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 720}, reduced_motion="reduce")
    found, faults = context.new_page(), []
    found.set_default_timeout(SLOW)
    found.on("pageerror", lambda error: faults.append(str(error)))
    found.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
    yield found
    context.close()
    assert not faults, faults


def harmless(page: Page) -> None:
    """Nothing ran, and nothing of it became an element."""
    page.wait_for_timeout(200)
    assert page.evaluate("[window.bad ?? null, document.querySelectorAll('[onerror], img[src=x]').length]") == [None, 0]


def test_a_link_lets_in_and_nothing_becomes_html(page: Page, browser: Browser, served: tuple[str, int],
                                                 tmp_path: Path) -> None:  # fmt: skip
    link, run = served
    base = link.split("?")[0]
    stranger = browser.new_context().new_page()
    answer = stranger.goto(base)
    assert answer is not None and answer.status == 401 and "whole link" in stranger.inner_text("body")
    stranger.context.close()

    page.goto(f"{link}&tab=train&run={run}")
    assert "key=" not in page.url and f"run={run}" in page.url
    ready(page)
    page.wait_for_function("LoraLab.state.view")
    assert EVIL in page.evaluate("document.body.innerText + JSON.stringify(LoraLab.state.view)")
    harmless(page)
    rows = tmp_path / f"{EVIL.replace('/', '')}.txt"
    rows.write_text(ROWS)
    page.get_by_role("tab", name="Adapt").click()
    page.locator("input[type=file][accept*='.jsonl']").set_input_files(rows)
    page.wait_for_function("LoraLab.state.about?.rows.some((r) => r.pieces.some((p) => p.text.includes('img')))")
    page.get_by_role("button", name="what is trained on").click()
    sheet = page.get_by_role("dialog", name="What is trained on")
    assert "<script>window.bad=2</script>" in sheet.inner_text().replace("\n", "")
    harmless(page)
    shoot(page, "hostile-rows")
    page.keyboard.press("Escape")


@pytest.mark.slow
def test_nor_does_what_is_asked_and_written(page: Page, served: tuple[str, int]) -> None:
    page.goto(f"{served[0]}&tab=compare&run={served[1]}")
    ready(page)
    prompt = page.locator("#panel-compare textarea").first
    prompt.fill(f"{EVIL}{NEXT}")
    page.locator("#compare-button").click()
    page.wait_for_function("document.querySelector('#adapted-output').ariaBusy === 'false' && "
                           "!document.querySelector('#compare-button').disabled")  # fmt: skip
    harmless(page)
    page.get_by_role("tab", name="Spectra").click()
    page.wait_for_selector("#spectrum-plot .main-svg")
    harmless(page)


def test_cells_of_a_table_are_no_formulas(page: Page, served: tuple[str, int]) -> None:
    page.goto(served[0])
    ready(page)
    rows = [["=1+1", "+cmd", "-2+3", "@x", "\tx", "\rx"], [-1.5, "-1.5", "a,b", 'a"b', None, "a\nb"]]
    text = page.evaluate("""(rows) => import(LoraLab.plotly.replace("plotly.min.js", "plot.js").replace(/^/, "/"))
        .then((m) => m.csv(rows))""", rows)  # fmt: skip
    assert text == "'=1+1,'+cmd,'-2+3,'@x,'\tx,\"'\rx\"\n-1.5,-1.5,\"a,b\",\"a\"\"b\",,\"a\nb\"\n", json.dumps(text)
