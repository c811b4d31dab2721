"""Makes the pictures of the README and the docs: `python -m tests.browser.pictures docs/screens`.

What a first visit shows at 1280×720: the toy in the middle of its first question, the default dials on Adapt, the
recorded run on the other tabs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.browser.conftest import SLOW, WIDE, Server, own_home, ready, written
from tests.browser_path import browser_path

WAIT_FOR = {"play&p=first&t=44": "#panel-play[data-ready=true]", "adapt": "#targets svg",
            "train": "#loss-plot .main-svg", "compare": "#cut-plot .main-svg",
            "spectra": "#spectrum-plot .main-svg"}  # fmt: skip


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        server = Server(own_home(Path(temporary)))
        server.start()
        browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            page = browser.new_page(viewport=WIDE, color_scheme="light", reduced_motion="reduce")
            page.set_default_timeout(SLOW)
            for tab, sign in WAIT_FOR.items():
                page.goto(f"{server.url}/?tab={tab}")
                ready(page)
                page.wait_for_selector(sign)
                if tab == "compare":
                    written(page)
                page.wait_for_timeout(800)
                name = tab.partition("&")[0]
                page.screenshot(path=folder / f"{name}.png")
                print(folder / f"{name}.png")
        finally:
            browser.close()
            server.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/screens"))
