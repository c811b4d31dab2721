"""The pointing finger: on every tab it points at something, and covers no word and no control."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page

from tests.browser.conftest import NARROW, WIDE

# What the finger's own pixels lie on: lines of text and controls. A ring has none inside.
COVERED = """() => {
  const finger = document.querySelector('.fg');
  if (finger.hidden) return null;
  const boxes = [...finger.children].map(n => n.getBoundingClientRect()).filter(r => r.width);
  const meets = (r) => r.width > 1 && r.height > 1 && boxes.some(b => r.left < b.right && b.left < r.right && r.top < b.bottom && b.top < r.bottom);
  const found = [], range = document.createRange();
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let n = texts.nextNode(); n; n = texts.nextNode()) {
    if (!n.data.trim() || n.parentElement.closest('.fg, script, style, .ll-hidden') || !n.parentElement.checkVisibility()) continue;
    range.selectNodeContents(n);
    if ([...range.getClientRects()].some(meets)) found.push(n.data.slice(0, 60));
  }
  for (const n of document.querySelectorAll('button, a[href], input, select, textarea, summary, canvas, [role=button], .main-svg'))
    if (n.checkVisibility() && !n.closest('.ll-hidden') && meets(n.getBoundingClientRect())) found.push(n.outerHTML.slice(0, 80));
  return {form: finger.dataset.form, words: finger.textContent, found};
}"""
READY = {"play": "#panel-play[data-ready=true]", "adapt": "#targets svg", "train": "#loss-plot .main-svg",
         "compare": "#cut-plot .main-svg", "spectra": "#spectrum-plot .main-svg", "questions": ".qs-choices"}  # fmt: skip
SAYS = {"play": "make a guess", "adapt": "click a matrix", "train": "train it", "compare": "turn this dial",
        "spectra": "click a cell", "questions": "make a guess"}  # fmt: skip


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_the_finger_covers_nothing(open_page: Callable[..., Page], size: Any) -> None:
    page = open_page("/?run=0", size=size)
    forms = {}
    for tab, sign in READY.items():
        page.get_by_role("tab", name=tab.capitalize()).click()
        page.wait_for_selector(sign)
        page.evaluate("document.querySelector('.fg').hidden = true")
        target = page.locator("#cp-k" if tab == "compare" else "#spectrum-heatmap" if tab == "spectra" else sign).first
        target.scroll_into_view_if_needed()
        page.wait_for_function("!document.querySelector('.fg').hidden")  # it has looked again
        page.wait_for_timeout(700)
        at = page.evaluate(COVERED)
        assert at is not None and at["words"] == SAYS[tab] and at["found"] == [], (tab, at)
        forms[tab] = at["form"]
    print(forms)
    assert list(forms.values()).count("ring") <= 3  # where there is room it is a hand
