"""Where the browser of the browser tests is: `python -m tests.browser_path` prints it, or exits 1 when there is none.

LORA_LAB_CHROMIUM, a Chromium or Chrome on the PATH, or the build that `playwright install chromium` keeps.
"""

from __future__ import annotations

import os
import shutil
import sys
from functools import cache

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@cache
def browser_path() -> str | None:
    """The executable to hand to Playwright's `launch(executable_path=…)`, or None when there is no browser."""
    given = os.environ.get("LORA_LAB_CHROMIUM")
    if given:
        return given if os.access(given, os.X_OK) else None
    for name in NAMES:
        if found := shutil.which(name):
            return found
    try:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            own = playwright.chromium.executable_path
    except Exception:  # Playwright is absent or has no driver for this system: then it has no browser either
        return None
    return own if os.access(own, os.X_OK) else None


if __name__ == "__main__":
    path = browser_path()
    print(path or "no browser found", file=sys.stdout if path else sys.stderr)
    sys.exit(0 if path else 1)
