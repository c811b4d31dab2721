"""A link restores every control of every tab; a choice that a run does not have stays; where a result belongs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Server, shoot

# Every control of the open tab that is in sight, with what it is set to.
CONTROLS = """() => [...document.querySelector('.ll-panel:not([hidden])').querySelectorAll(
  'select, input:not([type=file]), textarea, [aria-pressed], [aria-selected=true], [aria-current]')]
  .filter(n => n.checkVisibility() && !n.closest('.tr-past, .cp-tokens'))
  .map(n => [n.id || n.getAttribute('aria-label') || n.dataset.name || n.textContent,
    n.matches('select, input, textarea') ? n.value : n.getAttribute('aria-pressed') ?? n.dataset.m ?? '']
    .join(' = '))"""


def slide(page: Page, id: str, place: int) -> None:
    page.locator(id).evaluate("(n, v) => { n.value = v; n.dispatchEvent(new Event('input', {bubbles: true})); }", place)


def press(page: Page, *names: str) -> None:
    for name in names:
        page.locator(".ll-panel:not([hidden])").get_by_role("button", name=name, exact=True).first.click()


def play(page: Page) -> None:
    page.get_by_role("button", name="×30 seeds").click()
    page.wait_for_function("document.querySelector('.pg-say').textContent.includes('30 seeds')")
    slide(page, "#pg-r", 2)
    page.locator("#pg-init").select_option("both")
    press(page, "One step back", "×30 seeds")


def cut(page: Page) -> None:
    page.wait_for_function("document.querySelector('#cp-k').max === '8'")
    page.locator(".cp-top select").select_option("3")
    slide(page, "#cp-energy", 2)
    slide(page, "#cp-strength", 6)


def words(page: Page) -> None:
    page.locator(".cp-prompt").fill("name : The Anchor | food : fish & chips")
    press(page, "any text", "KL, all tokens")
    page.get_by_role("textbox", name="Any text").fill("Fish and chips, 50 % off + tea.")


def matrices(page: Page) -> None:
    page.locator(".kn-map [data-m='layers.3.v']").click()
    press(page, "only these", "all q")


def sides(page: Page) -> None:
    for text in ("k = 2", "× 0.5"):
        chip = page.locator(".sd-chip", has_text=text)
        for _ in range(40):  # at most four stand side by side, and those chosen first may come late
            if chip.is_enabled():
                break
            page.locator(".sd-chip[aria-pressed=true]").last.click()
            page.wait_for_timeout(250)
        chip.click()


def train(page: Page) -> None:
    page.wait_for_selector("#film-plot .main-svg")
    slide(page, "#film", 7)
    press(page, "by size")


def spectra(page: Page) -> None:
    page.locator("#spectrum-heatmap [data-m='layers.4.v']").click()
    expect(page.locator(".sp-right h2")).to_contain_text("layer 4,")
    press(page, "Tokens")
    page.locator(".sp-which").get_by_role("button", name="effective rank").click()
    page.locator(".sp-strip").get_by_role("button", name="effective rank").click()


@pytest.mark.parametrize(("begin", "act", "sign"), [
    ("tab=play&p=first&t=60", play, "#panel-play[data-ready=true]"),
    ("run=0&tab=train", train, "#film-plot .main-svg"),
    ("run=0&tab=compare", cut, ".ct-row output:not(:empty)"),
    ("run=0&tab=compare&way=words", words, "#cp-k"),
    ("run=0&tab=compare&way=matrices", matrices, ".kn-map [data-m]"),
    ("run=0&tab=compare&way=sides", sides, ".sd-chip"),
    ("run=0&tab=spectra", spectra, "#spectrum-heatmap [data-m]"),
], ids=["play", "train", "cut", "words", "matrices", "sides", "spectra"])  # fmt: skip
def test_a_link_restores_the_controls_of_each_tab(
    open_page: Callable[..., Page], begin: str, act: Callable[[Page], None], sign: str
) -> None:
    page = open_page(f"/?{begin}")
    page.wait_for_selector(sign, state="attached")
    before = page.evaluate(CONTROLS)
    act(page)
    page.wait_for_timeout(500)
    after, address = page.evaluate(CONTROLS), page.url.split("/", 3)[3]
    assert after != before and address != f"?{begin}"
    other = open_page(f"/{address}")
    try:
        other.wait_for_function(f"(want) => JSON.stringify(({CONTROLS})()) === want",
                                arg=other.evaluate("JSON.stringify", after), timeout=90_000)  # fmt: skip
    except Exception:
        assert other.evaluate(CONTROLS) == after, address
    assert other.url.split("/", 3)[3] == address


def test_a_matrix_that_the_run_has_not_stays_chosen(open_page: Callable[..., Page], run: int) -> None:
    page = open_page(f"/?run={run}&tab=spectra&m=layers.12.k")
    said = f"k of layer 12 is not in run {run}: showing"
    expect(page.locator(".sp-note")).to_contain_text(said)
    page.get_by_role("tab", name="Train").click()
    expect(page.locator(".tr-film-say")).to_contain_text(said)
    expect(page.locator(".fx-pick").nth(1)).to_have_value("k")
    assert page.evaluate("LoraLab.state.matrix") == "layers.12.k" and "m=layers.12.k" in page.url
    page.evaluate("LoraLab.state.matrix = 'layers.12.v'")  # one that it has
    page.get_by_role("tab", name="Spectra").click()
    expect(page.locator(".sp-right h2")).to_contain_text("layer 12, v")
    expect(page.locator(".sp-note")).to_be_empty()


def test_the_recorded_run_refills_the_form_too(open_page: Callable[..., Page], run: int, server: Server) -> None:
    page = open_page(f"/?run={run}&tab=train")
    page.locator(".tr-open:has-text('recorded')").click()
    steps = server.ask("run?run=0")["steps"]
    page.wait_for_function(f"LoraLab.state.config.steps === {steps} && LoraLab.state.data.task === 'restaurant'")
    assert "run=0" in page.url
    mark = page.locator("#panel-train .ll-from")
    expect(mark).to_be_hidden()
    page.fill("#steps input", "31")
    expect(mark).to_have_text(f"from steps = {steps}")


def test_what_differs_stands_in_a_table_and_all_fits(open_page: Callable[..., Page], run: int) -> None:
    page: Any = open_page(f"/?run={run}&tab=train")
    page.wait_for_selector("#loss-plot .main-svg")
    page.get_by_role("button", name="Lay recorded behind the open run").click()
    expect(page.locator(".tr-differs th[scope=row]").first).to_be_visible()
    assert "over=0" in page.url
    shoot(page, "train-differs")
    assert page.evaluate("document.documentElement.scrollHeight") <= 740
    page.reload()
    expect(page.locator(".tr-differs th[scope=row]").first).to_be_visible()
