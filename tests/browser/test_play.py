"""Play: the toy moves at once, asks before it shows, and says what its own numbers are."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import NARROW, WIDE, Server, ready, shoot

PRESETS = ("first", "bzero", "scale", "lowrank", "full", "noise", "swap", "cut")
SAY, STEP = "#panel-play .pg-say", "#panel-play .pg-at"


def test_it_is_first_and_moves_within_a_second(browser: Browser, server: Server) -> None:
    """From the moment its panel is there; nothing is asked of the server while it plays."""
    context = browser.new_context(viewport=WIDE, reduced_motion="no-preference")
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("#panel-play .pg-at")
    page.wait_for_function(
        "!document.querySelector('#panel-play .pg-at').textContent.startsWith('step 0 ')", timeout=3000
    )
    print("moves", page.evaluate("Math.round(performance.now())"), "ms after the page was asked for")
    assert page.get_by_role("tab").first.get_attribute("aria-selected") == "true"
    page.wait_for_function("LoraLab.state.about && LoraLab.state.time")
    page.wait_for_timeout(1500)
    asked: list[str] = []
    page.get_by_role("button", name="the largest").click()
    page.on("request", lambda r: asked.append(r.url))
    page.get_by_role("button", name="Lock my guess").click()
    page.wait_for_function("/^step (6|7|8)\\d /.test(document.querySelector('#panel-play .pg-at').textContent)")
    assert [url for url in asked if not url.endswith(("/ping", "/heartbeat"))] == []
    expect(page.locator(STEP)).to_contain_text("step 120 of 120", timeout=30_000)
    expect(page.locator(".pg-answer.right")).to_have_text("✓ the largest · your guess")
    assert "p=first" in page.url and "t=120" in page.url and "guess" not in page.url
    context.close()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_stands_and_its_sentence_follows_the_step(open_page: Callable[..., Page], preset: str) -> None:
    page = open_page(f"/?tab=play&p={preset}&t=9999")
    page.wait_for_selector("#panel-play[data-ready=true]")
    say = page.locator(SAY)
    end = say.inner_text()
    assert re.search(r"\d", end) and not re.search(r"NaN|undefined|null|∞", end + page.locator(".pg-live").inner_text())
    shoot(page, f"play-{preset}")
    page.get_by_role("button", name="Back to the start").click()
    assert page.locator(STEP).inner_text().split()[1] == "0"
    if preset not in ("scale",):  # there the start and the end are alike: that is the point
        assert say.inner_text() != end


def test_a_link_brings_the_same_text_back(open_page: Callable[..., Page]) -> None:
    page = open_page("/?tab=play&p=lowrank")
    expect(page.get_by_role("button", name="Lock my guess")).to_be_disabled()
    page.locator("#pg-r").focus()
    page.keyboard.press("ArrowRight")
    for _ in range(3):
        page.get_by_role("button", name="One step back").click()
    first, url = page.locator(SAY).inner_text(), page.url
    assert "r=3" in url and "t=117" in url and first.startswith("Rank 3 cannot pass 0.625")
    other = open_page(url[url.index("/?") :])
    assert other.locator(SAY).inner_text() == first
    assert other.locator("#panel-play .pg-live").inner_text() == page.locator("#panel-play .pg-live").inner_text()
    hidden = open_page("/?tab=play&p=first&t=30&hide=rate,alpha&r=900&rate=x&init=evil")
    assert not hidden.locator("#pg-rate").is_visible() and hidden.locator("#pg-r").input_value() == "16"


def test_sentences_follow_the_dials_and_divergence_has_a_reason(open_page: Callable[..., Page]) -> None:
    page = open_page("/?tab=play&p=bzero&t=150")
    page.wait_for_selector("#panel-play[data-ready=true]")
    say = page.locator(SAY)
    seen = {say.inner_text()}
    for init in ("B", "both", "none"):
        page.locator("#pg-init").select_option(init)
        page.wait_for_selector("#panel-play[data-ready=true]")
        seen.add(say.inner_text())
    assert len(seen) == 4
    expect(say).to_contain_text("0 learnt after 150 steps")
    page.locator("#pg-init").select_option("A")
    page.locator("#pg-rate").fill("0.5")
    expect(say).to_contain_text("Diverged at step")
    expect(say).to_contain_text("1/(s·σ₁) = 0.25")
    assert "NaN" not in page.locator("#panel-play").inner_text()


def test_it_can_be_played_by_keyboard(open_page: Callable[..., Page]) -> None:
    page = open_page("/?tab=play")
    page.get_by_role("button", name="the smallest").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Lock my guess")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".pg-answer.right")).to_contain_text("the largest")
    page.locator("#panel-play canvas").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#pg-cell")).to_contain_text("(BA)[1,2] =")
    page.get_by_role("button", name="Next: Why B = 0?").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#pg-q")).to_contain_text("never learns")
    page.keyboard.press("Escape")
    expect(page.locator(STEP)).to_contain_text("step 150 of 150")


def test_with_reduced_motion_only_steps(open_page: Callable[..., Page]) -> None:
    page = open_page("/?tab=play")
    page.wait_for_timeout(700)
    expect(page.locator(STEP)).to_contain_text("step 0 of")
    assert not page.get_by_role("button", name="slow").is_visible()
    page.get_by_role("button", name="step ▸").click()
    expect(page.locator(STEP)).to_contain_text("step 1 of")


def test_on_a_phone_the_play_bar_is_always_at_hand(open_page: Callable[..., Page]) -> None:
    page = open_page("/?tab=play&p=first&t=30", size=NARROW)
    box = page.locator("#panel-play .pg-bar").bounding_box()
    assert box is not None and box["y"] + box["height"] == pytest.approx(NARROW["height"], abs=2)
    page.get_by_role("tab", name="Adapt").click()
    assert not page.locator("#panel-play .pg-bar").is_visible()


def test_thirty_seeds_and_ones_own_valley(open_page: Callable[..., Page]) -> None:
    page = open_page("/?tab=play&p=first&t=120")
    page.get_by_role("button", name="×30 seeds").click()
    expect(page.locator(SAY)).to_contain_text("Over 30 seeds", timeout=20_000)
    page = open_page("/?tab=play&p=scale&t=100")
    expect(page.locator(SAY)).to_contain_text("differ by exactly 0", timeout=20_000)
    expect(page.locator(SAY)).to_contain_text("your best rate moved ×", timeout=20_000)


@pytest.mark.parametrize(("size", "scheme"), [
    pytest.param(WIDE, "light", id="wide-light"), pytest.param(NARROW, "dark", id="narrow-dark"),
    pytest.param(WIDE, "dark", id="wide-dark", marks=pytest.mark.slow),
    pytest.param(NARROW, "light", id="narrow-light", marks=pytest.mark.slow)])  # fmt: skip
def test_for_everybody(open_page: Callable[..., Page], size: Any, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    for query in ("p=first", "p=swap&t=500", "p=cut&t=400"):
        page = open_page(f"/?tab=play&{query}", size=size, scheme=scheme)
        ready(page)
        if "swap" not in query:
            page.get_by_text("more dials").click()
        shoot(page, f"play-{query[2:5]}-{'wide' if size is WIDE else 'narrow'}-{scheme}")
        result = Axe().run(page, options={"resultTypes": ["violations"]})
        found = [f"{v['id']}: {n['html'][:160]} {n.get('failureSummary', '')[:300]}"
                 for v in result.response["violations"] for n in v["nodes"]]  # fmt: skip
        assert not found, "\n".join(found)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
