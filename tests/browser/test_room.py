"""A room in real browsers: the presenter's keys drive a participant's page, on a phone, and the wall shows it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import NARROW, WIDE, shoot
from tests.room_server import serving

expect.set_options(timeout=120_000)  # only something that hangs takes so long

HOSTILE = "<img src=x onerror=alert(1)>"


class Hall:
    """A server with a room and no model, and the pages that were opened on it."""

    def __init__(self, browser: Browser, url: str, keys: dict[str, str]) -> None:
        self.browser, self.url, self.keys = browser, url, keys
        self.faults: list[str] = []
        self.contexts: list[Any] = []

    def open(self, role: str, size: Any = WIDE, scheme: Any = "light", path: str = "/?") -> Page:
        context = self.browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
        self.contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("console", lambda m: self.faults.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: self.faults.append(str(e)))
        page.on("request", lambda r: None if r.url.startswith((self.url, "data:", "blob:"))
                else self.faults.append(f"request to {r.url}"))  # fmt: skip
        page.goto(f"{self.url}{path}key={self.keys[role]}")
        return page


@pytest.fixture(scope="module")
def hall(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[Hall]:
    with serving(tmp_path_factory.mktemp("room"), stand_in=True) as (url, keys):
        found = Hall(browser, url, keys)
        yield found
        for context in found.contexts:
            context.close()
    assert not found.faults, "\n".join(found.faults)


@pytest.fixture(scope="module")
def presenter(hall: Hall) -> Page:
    page = hall.open("presenter")
    page.wait_for_selector(".rm-key")
    return page


@pytest.fixture(scope="module")
def phone(hall: Hall) -> Page:
    page = hall.open("participant", NARROW)
    page.wait_for_selector(".rm-badge")
    return page


def accessible(page: Page) -> None:
    from axe_playwright_python.sync_playwright import Axe

    result = Axe().run(page, context=".rm", options={"resultTypes": ["violations"]})
    found = [f"{v['id']}: {n['html'][:160]} {n.get('failureSummary', '')[:300]}"
             for v in result.response["violations"] for n in v["nodes"]]  # fmt: skip
    assert not found, "\n".join(found)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_way_in_and_a_nickname_that_stays_text(presenter: Page, phone: Page) -> None:
    expect(presenter.locator(".rm-door svg.rm-qr path")).to_have_attribute("d", re.compile(r"^M\d+ \d+h\d+v1h-\d+z"))
    phone.get_by_label("Your nickname").fill(HOSTILE[:24])
    phone.get_by_role("button", name="Save").click()
    expect(phone.locator(".rm-name [role=status]")).to_have_text("saved")
    accessible(presenter)
    accessible(phone)
    shoot(presenter, "room-lobby")


def test_four_keys_drive_the_other_page(presenter: Page, phone: Page) -> None:
    """And the reaction takes no longer than the page's next question to the server."""
    presenter.keyboard.press("p")
    expect(phone.locator(".rm-choice")).to_have_count(3)
    phone.locator(".rm-choice").nth(1).focus()
    phone.keyboard.press("Enter")
    expect(phone.locator(".rm-choice").nth(1)).to_have_attribute("aria-pressed", "true")
    expect(presenter.locator(".rm-count")).to_have_text("1 of 1 have guessed")
    assert presenter.locator(".rm-bars").count() == 0 and phone.locator(".rm-bars").count() == 0
    accessible(phone)
    phone.reload()  # a reload comes back to the stage and the guess
    expect(phone.locator(".rm-choice").nth(1)).to_have_attribute("aria-pressed", "true")
    presenter.keyboard.press("r")
    expect(phone.locator(".rm-play .pg-at")).to_contain_text("step 120 of 120")
    expect(presenter.locator(".rm-count")).to_have_text("1 of 1 curves are here")
    assert not phone.locator("#panel-play").is_visible()
    presenter.keyboard.press("v")
    expect(phone.locator(".rm-bars .rm-n")).to_have_text(["0", "1", "0"])
    expect(phone.locator(".rm-bars .right")).to_contain_text("the largest")
    expect(presenter.locator(".rm-card .rm-plot .main-svg").first).to_be_attached()
    accessible(presenter)
    shoot(phone, "room-reveal-phone")
    presenter.keyboard.press("d")
    expect(phone.locator(".rm-strip .rm-line")).to_have_text("Discuss: all tabs are open")
    phone.get_by_role("button", name="Look around").click()
    expect(phone.locator("#panel-play")).to_be_visible()
    expect(phone.locator(".rm-body")).not_to_be_visible()
    phone.get_by_role("button", name="Back to the room").click()
    expect(phone.locator(".rm-bars")).to_be_visible()


def test_keys_are_the_presenters_alone(presenter: Page, phone: Page) -> None:
    assert phone.locator(".rm-key").count() == 0
    for key in "prvd":
        phone.keyboard.press(key)
    expect(presenter.get_by_role("button", name="Discuss")).to_have_attribute("aria-current", "true")
    presenter.get_by_role("button", name="Your own").click()
    presenter.get_by_label("Your question").fill("P, R, V or D? " + HOSTILE)  # letters in a field press nothing
    expect(presenter.get_by_role("button", name="Discuss")).to_have_attribute("aria-current", "true")
    presenter.get_by_label("Choice A").fill("one " + HOSTILE)
    presenter.get_by_label("Choice B").fill("two")
    presenter.get_by_role("button", name="Predict").click()
    expect(phone.locator(".rm-title").first).to_have_text("P, R, V or D? " + HOSTILE)
    expect(phone.locator(".rm-choice").first).to_contain_text(HOSTILE)
    assert phone.locator(".rm img").count() == 0
    presenter.locator("body").click(position={"x": 4, "y": 700})
    presenter.keyboard.press("v")
    expect(phone.locator(".rm-say").first).to_have_text("Nobody has guessed.")


def test_cells_are_taken_run_and_opened_from_the_wall(presenter: Page, phone: Page, hall: Hall) -> None:
    presenter.get_by_role("button", name="Grid").click()
    presenter.get_by_label("Ranks").fill("1, 4")
    presenter.get_by_role("spinbutton", name="Steps").fill("6")
    presenter.get_by_role("button", name="Set the grid").click()
    expect(presenter.locator(".rm-gridform [role=status]")).to_contain_text("4 cells of ≈")
    presenter.get_by_label("The next question").select_option("card:rank")
    presenter.get_by_label("What Run does").select_option("grid")
    presenter.get_by_role("button", name="Predict").click()
    phone.locator(".rm-choice").first.click()
    presenter.get_by_role("button", name="Run", exact=False).first.click()
    expect(phone.locator(".rm-cell.dealt")).to_contain_text(re.compile("≈\u00a0\\d+\u00a0s"))
    accessible(phone)
    phone.locator(".rm-cell").nth(1).click()
    expect(phone.locator(".rm-run")).to_contain_text("held-out loss 2.40")
    wall = hall.open("presenter", WIDE, "dark", "/?wall&")
    presenter.get_by_role("button", name="Reveal").click()
    expect(wall.locator(".rm-table tbody tr")).to_have_count(1)
    expect(wall.locator(".rm-say", has_text="Best: r 4 · q v")).to_be_visible()
    expect(wall.locator(".rm-plot .main-svg").first).to_be_attached()
    small = wall.evaluate("""[...document.querySelectorAll('.rm-wall *')].filter((n) =>
        !n.closest('.ll-export, .rm-claim, .ll-button') && n.checkVisibility()
        && [...n.childNodes].some((c) => c.nodeType === 3 && c.data.trim())
        && parseFloat(getComputedStyle(n).fontSize) < 18).map((n) => n.textContent)""")
    assert small == []  # for the back row
    assert wall.evaluate("document.documentElement.scrollHeight <= innerHeight + 1")  # all of it on one screen
    accessible(wall)
    shoot(wall, "room-wall-dark")
    phone.locator(".rm-table button").first.click()
    expect(phone.locator("#panel-train")).to_be_visible()
    expect(phone.locator(".tr-status")).to_contain_text("run 1")
