"""Compare in the browser: dials that answer at once, a saved cut, matrices to switch, any text, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Server, shoot, written


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """Texts and losses are a real model's, on a machine that may be busy."""
    expect.set_options(timeout=60_000)
    yield
    expect.set_options(timeout=30_000)


def slide(page: Page, id: str, place: int) -> None:
    page.locator(id).evaluate("(n, v) => { n.value = v; n.dispatchEvent(new Event('input', {bubbles: true})); }", place)


def test_what_is_typed_while_a_run_is_opened_stays(open_page: Callable[..., Page], run: int) -> None:
    page = open_page("/?run=0&tab=compare")
    written(page)
    field, pick = page.get_by_role("textbox", name="Prompt"), page.get_by_role("combobox", name="Held-out example")
    field.fill("of the run before")
    held: list[Any] = []
    page.route("**/lab/api/compare?*", lambda route: held.append(route))
    page.get_by_role("tab", name="Train").click()
    page.locator(f".tr-run[data-run='{run}'] .tr-open").click()
    page.get_by_role("tab", name="Compare").click()
    for _ in range(100):
        page.wait_for_timeout(50)
        if held:
            break
    field.fill("a thought of one's own")
    page.wait_for_timeout(500)
    assert "thought" in page.url
    held[0].continue_()
    page.unroute("**/lab/api/compare?*")
    expect(page.locator(".cp-panes h2.ll-warm")).to_contain_text(f"run {run}")
    expect(field).to_have_value("a thought of one's own")
    expect(pick).to_have_value("own")
    page.wait_for_function("location.search.includes('thought')")
    page.get_by_role("tab", name="Train").click()
    page.locator(".tr-run[data-run='0'] .tr-open").click()  # and another run begins with its own rows
    page.get_by_role("tab", name="Compare").click()
    expect(pick).to_have_value("0")
    page.wait_for_function("!location.search.includes('thought')")


def test_the_dials_move_together_and_the_loss_follows(open_page: Callable[..., Page], run: int) -> None:
    page = open_page(f"/?run={run}&tab=compare")
    written(page)
    page.wait_for_function("document.querySelector('#cp-k').max === '4'")
    page.wait_for_function(
        f"fetch('lab/api/held?run={run}').then(r => r.json()).then(r => r.families.k?.rows === r.of)", polling=500
    )
    page.wait_for_selector("#cut-plot .main-svg")
    before = {n: page.locator(f".ct-row output[for='{n}']").inner_text() for n in ("cp-k", "cp-energy", "cp-mb")}
    assert before["cp-k"] == "4" and before["cp-energy"] == "100 %"
    page.wait_for_timeout(1100)  # the page has the curve's last rows
    took, waits = page.evaluate("""() => {
        const k = document.querySelector('#cp-k'), now = performance.now();
        k.value = 1;
        k.dispatchEvent(new Event('input', {bubbles: true}));
        return [performance.now() - now, document.querySelector('#adapted-output').ariaBusy]; }""")
    assert waits == "true"  # what stands there is of the place before
    after = {n: page.locator(f".ct-row output[for='{n}']").inner_text() for n in before}
    assert after["cp-k"] == "1" and after["cp-energy"] != "100 %" and after["cp-mb"] != before["cp-mb"]
    want = page.evaluate(f"fetch('lab/api/held?run={run}').then(r => r.json()).then(r => r.families.k.loss[1])")
    assert page.locator("#cp-loss-now").inner_text() == f"{want:.2f}"
    print(f"dial to loss: {took:.0f} ms")
    written(page)
    expect(page.locator(".cp-panes h2.ll-warm")).to_contain_text("1 of 4 directions")
    assert "cut=k.1" in page.url
    slide(page, "#cp-k", 0)
    written(page)
    assert page.locator("#base-output").inner_text() == page.locator("#adapted-output").inner_text()
    page.locator("#cp-strength").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".ct-row output[for='cp-strength']")).to_have_text("× 0.75")
    page.get_by_role("button", name="all of ΔW again").click()
    expect(page.locator(".ct-row output[for='cp-k']")).to_have_text("4")
    shoot(page, "compare-cut")


def test_a_cut_is_saved_and_opened(open_page: Callable[..., Page], run: int, server: Server) -> None:
    page = open_page(f"/?run={run}&tab=compare&cut=k.2")
    written(page)
    expect(page.locator(".ct-row output[for='cp-k']")).to_have_text("2")  # the address has set the dial
    page.locator("#cp-save").click()
    expect(page.locator(".ct-saved")).to_contain_text("Read back, its loss is")
    with page.expect_download() as taken:
        page.locator(".ct-saved a").click()
    assert taken.value.suggested_filename.endswith("-adapter.zip")
    page.locator(".ct-saved button").click()
    new = page.evaluate("LoraLab.state.run")
    assert new != run and server.ask(f"dials?run={new}")["rank"] == 2


def test_matrices_are_switched_by_click_name_and_layer(open_page: Callable[..., Page], run: int) -> None:
    page = open_page(f"/?run={run}&tab=compare&way=matrices")
    written(page)
    say = page.locator(".kn-side .ct-say")
    expect(say).to_contain_text("All 60 matrices act")
    page.locator(".kn-map [data-m='layers.3.v']").click()
    expect(say).to_contain_text("59 of 60")
    assert "off=3.v" in page.url
    page.reload()  # the link restores it
    expect(say).to_contain_text("59 of 60")
    page.get_by_role("button", name="all q").click()
    expect(say).to_contain_text("29 of 60")
    page.get_by_role("button", name="only these").click()
    expect(say).to_contain_text("31 of 60")
    page.get_by_role("button", name="layer 3", exact=True).focus()
    page.keyboard.press("Enter")  # q and v of layer 3 were both chosen; now neither is
    expect(say).to_contain_text("29 of 60")
    expect(say).to_contain_text("loss")  # measured by itself
    page.get_by_role("button", name="all on").click()
    expect(say).to_contain_text("All 60 matrices act")
    page.locator("#kn-find").click()
    expect(say).to_contain_text("12 of 60")
    expect(page.locator(".kn-side > .ll-note").last).to_contain_text("of the gain, measured on")
    assert page.locator(".kn-map .cm-cell.off").count() == 48
    shoot(page, "compare-matrices")


def test_any_text_is_read_token_by_token(open_page: Callable[..., Page], run: int) -> None:
    page = open_page(f"/?run={run}&tab=compare&way=words")
    written(page)
    page.get_by_role("button", name="any text").click()
    page.get_by_role("textbox", name="Any text").fill("The weather was lovely <b>all</b> day.")
    expect(page.locator(".cp-tok").last).to_contain_text(".")
    expect(page.locator(".cp-tokens")).to_contain_text("<b>")
    page.get_by_role("button", name="KL, all tokens").click()
    expect(page.locator(".cp-words .ct-say")).to_contain_text("nats a token")
    page.locator(".cp-tok").first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".cp-said")).to_contain_text("KL")
    page.get_by_role("button", name="the held-out answer").click()
    expect(page.locator(".cp-tokens")).not_to_contain_text("weather")
    shoot(page, "compare-words")


def test_four_side_by_side_and_a_pair(open_page: Callable[..., Page], run: int) -> None:
    page = open_page(f"/?run={run}&tab=compare&way=sides")
    page.wait_for_selector(".sd-chip")
    chips: Any = page.locator(".sd-chip")
    pressed = page.locator(".sd-chip[aria-pressed=true]")
    expect(pressed).to_have_count(3)  # the base, this run, and another one
    expect(page.locator(".pr .ct-say").first).to_contain_text("cosine")
    chips.filter(has_text="k = 1").click()
    expect(pressed).to_have_count(4)
    assert chips.filter(has_text="k = 2").is_disabled()
    page.locator("#compare-button").click()
    expect(page.locator(".sd-loss b")).to_have_count(4)
    page.locator("#pair-sum").click()
    expect(page.locator(".pr-table td")).to_have_count(8)
    expect(page.locator(".pr-words")).to_contain_text("Added up")
    shoot(page, "compare-sides")
