"""The pointing finger: on every tab it points at something, and covers no word and no control."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page

from tests.browser.conftest import NARROW, WIDE

# What the finger's own pixels lie on: lines of text and controls. A ring has none inside.
COVERED = """() => {
  const finger = document.querySelector('.fg'), found = [], range = document.createRange();
  if (finger.hidden) return null;
  const boxes = [...finger.children].map(n => n.getBoundingClientRect()).filter(r => r.width);
  const over = (r, b) => r.left < b.right && b.left < r.right && r.top < b.bottom && b.top < r.bottom;
  const meets = (r) => r.width > 1 && r.height > 1 && boxes.some(b => over(r, b));
  const seen = (n) => n.checkVisibility() && !n.closest('.fg, script, style, .ll-hidden');
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let n = texts.nextNode(); n; n = texts.nextNode()) {
    if (!n.data.trim() || !seen(n.parentElement)) continue;
    range.selectNodeContents(n);
    if ([...range.getClientRects()].some(meets)) found.push(n.data.slice(0, 60));
  }
  for (const n of document.querySelectorAll('button, a[href], input, select, textarea, summary, canvas, .main-svg'))
    if (seen(n) && meets(n.getBoundingClientRect())) found.push(n.outerHTML.slice(0, 80));
  return {form: finger.dataset.form, words: finger.textContent, found};
}"""
READY = {
    "play": "#panel-play[data-ready=true]", "adapt": "#targets svg", "train": "#loss-plot .main-svg",
    "compare": "#cut-plot .main-svg", "spectra": "#spectrum-plot .main-svg", "questions": ".qs-choices",
}  # fmt: skip
SAYS = {
    "play": "make a guess", "adapt": "click a matrix", "train": "train it", "compare": "turn this dial",
    "spectra": "click a cell", "questions": "make a guess",
}  # fmt: skip
POINTED_AT = {"compare": "#cp-k", "spectra": "#spectrum-heatmap"}


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_the_finger_covers_nothing(open_page: Callable[..., Page], size: Any) -> None:
    page = open_page("/?run=0", size=size)
    forms = {}
    for tab, sign in READY.items():
        page.get_by_role("tab", name=tab.capitalize()).click()
        page.wait_for_selector(sign)
        page.evaluate("document.querySelector('.fg').hidden = true")
        page.locator(POINTED_AT.get(tab, sign)).first.scroll_into_view_if_needed()
        page.wait_for_function("!document.querySelector('.fg').hidden")  # it has looked again
        page.wait_for_timeout(700)
        at = page.evaluate(COVERED)
        assert at is not None and at["words"] == SAYS[tab] and at["found"] == [], (tab, at)
        forms[tab] = at["form"]
    print(forms)
    assert list(forms.values()).count("ring") <= 3  # where there is room it is a hand
