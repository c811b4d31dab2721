"""The views behind each tab's first one, for everybody: axe, nothing wider than the screen, what can be saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page

from tests.browser.conftest import NARROW, WIDE, shoot

VIEWS = {
    "compare-cut": ("tab=compare&cut=k.2&strength=0.5", "#cut-plot .main-svg"),
    "compare-matrices": ("tab=compare&way=matrices&off=3.v_4.q", ".kn-map .cm-cell.off"),
    "compare-words": ("tab=compare&way=words", ".cp-tok"),
    "compare-sides": ("tab=compare&way=sides&sides=base_0_0.k.2", ".sd-chip[aria-pressed=true]"),
    "spectra-beside": ("tab=spectra&lens=beside&map=stable_rank", "#inside-plot .main-svg"),
    "spectra-tokens": ("tab=spectra&lens=tokens&line=stable_rank", ".sp-tok"),
}  # fmt: skip


@pytest.mark.parametrize(("size", "scheme"), [
    pytest.param(WIDE, "light", id="wide-light"), pytest.param(NARROW, "dark", id="narrow-dark"),
    pytest.param(WIDE, "dark", id="wide-dark", marks=pytest.mark.slow),
    pytest.param(NARROW, "light", id="narrow-light", marks=pytest.mark.slow)])  # fmt: skip
def test_every_view_for_everybody(open_page: Callable[..., Page], size: Any, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    found = []
    for name, (query, sign) in VIEWS.items():
        page = open_page(f"/?run=0&{query}", size=size, scheme=scheme)
        page.wait_for_selector(sign)
        shoot(page, f"{name}-{'wide' if size is WIDE else 'narrow'}-{scheme}")
        wide = page.evaluate("""() => [...document.querySelectorAll('.ll-panel:not([hidden]) .ll-card')].filter(n =>
            n.scrollWidth > n.clientWidth + 1).map(n => n.className)""")
        assert not wide and page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (name, wide)
        if size is WIDE:
            assert page.evaluate("document.documentElement.scrollHeight") <= 740, name
        result = Axe().run(page, options={"resultTypes": ["violations"]})
        found += [f"{name}: {v['id']}: {n['html'][:160]} {n.get('failureSummary', '')[:300]}"
                  for v in result.response["violations"] for n in v["nodes"]]  # fmt: skip
        page.close()
    assert not found, "\n".join(found)


def test_the_line_below_the_map_can_be_saved(open_page: Callable[..., Page]) -> None:
    page = open_page("/?run=0&tab=spectra")
    page.wait_for_selector("#spectrum-plot .main-svg")
    page.get_by_label("Save the line").click()
    with page.expect_download() as download:
        page.locator(".sp-strip .ll-export").get_by_role("button", name="CSV").click()
    lines = download.value.path().read_text().splitlines()
    assert lines[0] == "layer,q,v" and len(lines) == 31
    with page.expect_download() as download:
        page.locator(".sp-strip .ll-export").get_by_role("button", name="SVG").click()
    assert b"layer" in download.value.path().read_bytes()
