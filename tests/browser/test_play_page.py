"""docs/play.html: the toy in one file, opened without a server."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Request, expect

from tests.browser.conftest import NARROW, ROOT, SLOW

FILE = (ROOT / "docs" / "play.html").as_uri()


@pytest.fixture
def play(browser: Browser) -> Iterator[Callable[..., Page]]:
    """A page of the file; it asks for nothing, and nothing goes wrong in it."""
    contexts, faults = [], []

    def asked(request: Request) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            faults.append(request.url)

    def opened(query: str = "", **more: Any) -> Page:
        context = browser.new_context(**{"reduced_motion": "reduce", **more})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SLOW)
        page.on("pageerror", lambda e: faults.append(str(e)))
        page.on("request", asked)
        page.goto(FILE + query)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not faults


def test_it_moves_by_itself(play: Callable[..., Page]) -> None:
    page = play(reduced_motion="no-preference")
    expect(page.locator(".pg-at")).not_to_have_text(re.compile("^step 0 "))  # a waiting function would be an eval


def test_a_link_behind_the_sign_brings_the_same_back(play: Callable[..., Page]) -> None:
    page = play("#p=lowrank")
    page.locator("#pg-r").focus()
    page.keyboard.press("ArrowRight")
    for _ in range(3):
        page.get_by_role("button", name="One step back").click()
    said = page.locator(".pg-say").inner_text()
    assert "r=3" in page.url and "t=117" in page.url and said.startswith("Rank 3 cannot pass 0.625")
    other = play(page.url[page.url.index("#") :])
    expect(other.locator(".pg-say")).to_have_text(said)


def test_by_keyboard_from_guess_to_the_next_question(play: Callable[..., Page]) -> None:
    page = play()
    page.get_by_role("button", name="the smallest").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    expect(page.locator(".pg-answer.right")).to_contain_text("the largest")
    page.get_by_role("button", name="Next: Why B = 0?").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#pg-q")).to_contain_text("never learns")
    page.keyboard.press("Escape")
    expect(page.locator(".pg-at")).to_contain_text("step 150 of 150")
    page.locator("#pg-init").select_option("none")
    expect(page.locator(".pg-say")).to_contain_text("0 learnt after 150 steps")


def test_what_is_turned_shows_at_once_and_the_last_film_counts(play: Callable[..., Page]) -> None:
    page = play("#p=noise&t=600")
    page.wait_for_selector("#play[data-ready=true]")
    took, values = page.evaluate("""() => {
        const dial = document.querySelector('#pg-r'), out = document.querySelector('output[for=pg-r]'), seen = [];
        const began = performance.now();
        const turn = (r) => { dial.value = r; dial.dispatchEvent(new Event('input')); seen.push(out.textContent); };
        [5, 9, 2].forEach(turn);
        return [performance.now() - began, seen];
    }""")
    print(f"three turns: {took:.0f} ms")
    assert values == ["5", "9", "2"]
    page.wait_for_selector("#play[data-ready=true]")
    expect(page.locator(".pg-say")).to_contain_text("Rank 2 stands at")


def test_pictures_and_numbers_are_saved(play: Callable[..., Page]) -> None:
    page = play("#p=first&t=60")
    for what, rows in (("the matrices", 1 + 16 * 24 * 3 + 4 * 40), ("the curves", 1 + 121)):
        page.get_by_label(f"Save {what}").click()
        box = page.locator(".pg-save[open]")
        with page.expect_download() as download:
            box.get_by_role("button", name="CSV").click()
        lines = download.value.path().read_text().splitlines()
        assert len(lines) == rows and lines[0].split(",")[0] in ("matrix", "step")
        with page.expect_download() as download:
            box.get_by_role("button", name="PNG").click()
        assert download.value.path().read_bytes().startswith(b"\x89PNG")
        page.keyboard.press("Escape")


def test_thirty_seeds_of_the_swaps(play: Callable[..., Page]) -> None:
    page = play("#p=swap&t=300")
    page.get_by_role("button", name="×30 seeds").click()
    expect(page.locator(".pg-say")).to_contain_text("Over 30 seeds that ends between", timeout=60_000)


def test_all_dials_are_at_hand_on_a_phone(play: Callable[..., Page]) -> None:
    page = play("#p=first&t=60", viewport=NARROW)
    assert page.locator(".pg-dials .pg-dial:visible").count() == 2
    page.get_by_text("more dials").click()
    for name in ("alpha", "rule", "init", "std", "opt", "rstar", "spectrum", "inputs", "seed"):
        dial = page.locator(f"#pg-{name}")
        dial.scroll_into_view_if_needed()
        assert dial.is_visible(), name
    box = page.locator(".pg-popmore .pg-sheet").bounding_box()
    assert box is not None and box["y"] >= 0 and box["y"] + box["height"] <= NARROW["height"]
