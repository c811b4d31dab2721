"""What the page costs: how soon something is seen, how soon a spectrum, how many events, and what training pays for it.

python -m benchmarks.bench_page [--steps 60] [--repeats 3]

Needs Chromium and Playwright, as the browser's tests do.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.kit import record

CELLS = ("layers.3.q", "layers.12.v", "layers.20.q", "layers.29.v")
PAINT = "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0"
# From the click until the curve's data belong to another matrix and a frame has been drawn.
CLICK = """(cell) => new Promise(done => {
  const plot = document.querySelector('#spectrum-plot'), before = plot.innerHTML, at = performance.now();
  const look = () => plot.innerHTML === before ? requestAnimationFrame(look)
    : requestAnimationFrame(() => done(performance.now() - at));
  document.querySelector(`#spectrum-heatmap [data-m='${cell}']`).click();
  look();
})"""
LISTEN = """() => { window.heard = []; new MutationObserver(() => heard.push(performance.now()))
  .observe(document.querySelector('#run-status'), {subtree: true, childList: true, characterData: true}); }"""


def body(steps: int) -> dict[str, Any]:
    """A training that both sides run: without held-out rows, so that its time is that of its steps."""
    config = {"steps": steps, "batch_size": 4, "eval_rows": 0, "seed": 0}
    spec = {"targets": ["q", "v"], "rank": 8}
    return {"model": "smollm2-135m", "spec": spec, "config": config, "data": {"task": "sentiment"}}


def run(steps: int, repeats: int) -> None:
    from playwright.sync_api import sync_playwright

    from app.runs.store import RunStore
    from tests.browser.conftest import Server, own_home
    from tests.browser_path import browser_path

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        home = own_home(Path(folder))
        server = Server(home)
        server.start()
        try:

            def opened(path: str) -> tuple[Any, Any]:
                browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
                page = browser.new_page(viewport={"width": 1280, "height": 720})
                page.set_default_timeout(240_000)
                page.goto(server.url + path)
                return browser, page

            paints = []
            for _ in range(repeats):
                browser, page = opened("/")
                page.wait_for_function(f"({PAINT})() > 0")
                paints.append(page.evaluate(PAINT))
                browser.close()
            record("page first paint", "from a fresh browser's request to something seen", {"ours": paints, "limit": [
                1000.0] * repeats}, peer="limit", unit="ms", reach=1.0, at_least=False)  # fmt: skip

            browser, page = opened("/?tab=spectra")
            page.wait_for_selector("#spectrum-plot .main-svg")
            page.locator(f"#spectrum-heatmap [data-m='{CELLS[0]}']").click()
            page.wait_for_timeout(1000)
            clicks = [page.evaluate(CLICK, c) for _ in range(repeats) for c in (*CELLS[1:], CELLS[0])]
            record("page spectrum", "from a click on a matrix to its spectrum", {"ours": clicks, "limit": [
                200.0] * len(clicks)}, peer="limit", unit="ms", reach=1.0, at_least=False)  # fmt: skip
            browser.close()

            watched, alone, rates = [], [], []

            def trained(watch: bool) -> float:
                """Seconds of a training; what watches it is there before it begins, while another one is trained."""
                before = server.ask("train", body(steps // 4))["run"]
                run = server.ask("train", body(steps))["run"]
                if watch:
                    browser, page = opened(f"/?tab=train&run={run}")
                    page.wait_for_selector("#run-status", state="attached")
                    page.evaluate(LISTEN)
                server.ended(before)
                server.ended(run)
                if watch:
                    heard = page.evaluate("heard")
                    rates.append(1000 * (len(heard) - 1) / (heard[-1] - heard[0]) if len(heard) > 2 else 0.0)
                    browser.close()
                return float(RunStore(home).get(run).result["train_s"])

            trained(False)  # the page cache and the estimate know the model then
            for i in range(repeats):
                for watch in ((False, True), (True, False))[i % 2]:
                    (watched if watch else alone).append(trained(watch))
            record("page while training", f"{steps} steps with the page open in a browser on the same two cores", {
                "ours": watched, "no page": alone}, peer="no page", unit="s", reach=1.03, at_least=False,
                more={"events_per_s": statistics.median(rates)})  # fmt: skip
        finally:
            server.stop()


if __name__ == "__main__":
    given = sys.argv[1:]

    def option(name: str, default: int) -> int:
        return int(given[given.index(name) + 1]) if name in given else default

    run(option("--steps", 60), option("--repeats", 3))
