"""Browsers that walk through the tabs of a page: `python -m benchmarks.load_browsers URL COUNT SECONDS`.

The last line printed is a JSON object: how long the pages took to be there, how many tabs were opened, what was wrong.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

TABS = ("adapt", "train", "compare", "spectra", "questions", "play")


def walk(url: str, count: int, seconds: float) -> dict[str, Any]:
    from playwright.sync_api import sync_playwright

    from tests.browser_path import browser_path

    errors: list[str] = []
    there: list[float] = []
    tabs: list[float] = []
    until = time.monotonic() + seconds
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox", "--disable-gpu"])
        pages = []
        for _ in range(count):
            page = browser.new_context(viewport={"width": 1280, "height": 720}).new_page()
            page.set_default_timeout(120_000)
            page.on("pageerror", lambda error: errors.append(f"browser: {error}"[:300]))
            page.on("console", lambda m: errors.append(f"browser: {m.text}"[:300]) if m.type == "error" else None)
            began = time.monotonic()
            page.goto(url)
            look = page.get_by_role("button", name="Look around")  # a participant is in the room at first
            look.or_(page.locator("#tab-adapt:visible")).first.wait_for()
            if look.is_visible():
                look.click()
            page.wait_for_selector("#tab-adapt")
            there.append(1000 * (time.monotonic() - began))
            pages.append(page)
        step = 0
        while time.monotonic() < until:
            for page in pages:
                name = TABS[step % len(TABS)]
                began = time.monotonic()
                page.locator(f"#tab-{name}").click()
                page.wait_for_selector(f"#panel-{name}", state="visible")
                tabs.append(1000 * (time.monotonic() - began))
            step += 1
            pages[0].wait_for_timeout(max(0, min(4000, 1000 * (until - time.monotonic()))))
        browser.close()
    tabs.sort()
    p95 = round(tabs[int(0.95 * (len(tabs) - 1))]) if tabs else None
    return {"count": count, "there_ms": list(map(round, there)), "tabs": len(tabs), "tab_p95_ms": p95,
            "errors": errors[:20]}  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(walk(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))))
