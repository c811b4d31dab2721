"""The Questions tab as people use it: guess, lock, see; run it here, stop it, go on; by keyboard; and for everybody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from lora_core.experiments import NAMES, find_experiment, stored_result
from tests.browser.conftest import NARROW, SLOW, WIDE, Server, own_home, ready, shoot

ASKED = "/?tab=questions&q=objective"
E = find_experiment("objective")
STORED = next(n for n in NAMES if stored_result(n))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of this file's own, whose experiments measure nothing; cells take most of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPERIMENT_CELL_S", "0.8")
        found = Server(own_home(tmp_path_factory.mktemp("questions")), module="tests.browser.questions_server")
        found.start()
        yield found
        found.stop()


def skip_all(page: Page) -> None:
    """As somebody who has guessed everywhere: the first answer."""
    page.evaluate("(names) => names.forEach((n) => localStorage.setItem(`ll-guess-${n}`, '0'))", list(NAMES))


def panel(page: Page) -> Any:
    return page.locator("#panel-questions")


def test_a_refusal_at_the_start_is_made_up_for(open_page: Callable[..., Page]) -> None:
    """Somebody whose page was refused one answer among many finds the questions when they look for them."""
    page = open_page()
    page.route("**/lab/api/questions", lambda r: r.fulfill(json={"error": "one at a time", "field": ""}), times=1)
    page.reload()
    ready(page)
    page.get_by_role("tab", name="Questions").click()
    expect(panel(page).locator(".qs-item")).to_have_count(len(NAMES))
    expect(panel(page).get_by_role("heading").first).to_be_visible()
    expect(panel(page).locator(".ll-fault").first).to_be_empty()


def test_it_is_asked_first_and_nothing_is_shown(open_page: Callable[..., Page]) -> None:
    stored = stored_result(STORED)
    e = find_experiment(STORED)
    page = open_page()
    told: list[str] = []
    page.on("response", lambda r: told.append(r.url))
    page.get_by_role("tab", name="Questions").click()
    page.locator(f".qs-item[data-name={STORED}]").click()
    expect(page.get_by_role("heading", name=e.question)).to_be_visible()
    lock = page.get_by_role("button", name="Lock my guess")
    expect(lock).to_be_disabled()
    text = page.locator("body").inner_text()
    assert stored is not None and e.claim not in text and stored.sentence not in text
    assert not any("/question?" in url for url in told), "what was found is not even asked for"
    guess = next(i for i in range(3) if i != e.answer)
    page.get_by_label(e.choices[guess]).check()
    expect(panel(page)).not_to_contain_text(e.claim)
    lock.click()
    expect(panel(page)).to_contain_text(e.claim)
    expect(page.locator(".qs-sentence").first).to_have_text(stored.sentence)
    expect(page.locator(".qs-verdict").first).to_contain_text(stored.verdict)
    expect(page.locator(".qs-verdict").first).to_contain_text("recorded")
    expect(page.locator(".qs-command").first).to_have_text(stored.command)
    expect(page.locator("li.qs-choice.guess")).to_contain_text(e.choices[guess])
    expect(page.locator("li.qs-choice.right")).to_contain_text(e.choices[e.answer])
    page.wait_for_selector(".qs-plot .main-svg")
    assert "guess" not in page.url and f"q={STORED}" in page.url
    page.reload()
    ready(page)
    expect(page.locator("li.qs-choice.guess")).to_contain_text("your guess")  # the browser remembers
    page.get_by_role("button", name="ask me again").click()
    expect(panel(page)).not_to_contain_text(e.claim)


def test_it_is_run_here_stopped_and_goes_on(open_page: Callable[..., Page], server: Server) -> None:
    page = open_page(ASKED)
    page.get_by_role("button", name="skip the guess").click()
    expect(panel(page)).to_contain_text(E.claim)
    before = page.locator(".qs-result").count()
    page.locator("#qs-quick").click()
    expect(page.locator(".qs-says")).to_contain_text("the quick version")
    expect(page.locator(".qs-run progress")).to_be_visible()
    page.wait_for_function("document.querySelector('.qs-run progress')?.value > 0.2")
    expect(page.locator(".qs-says")).to_contain_text("left")
    page.locator(f".qs-item[data-name={STORED}]").click()  # one at a time, and it goes on meanwhile
    if page.get_by_role("button", name="skip the guess").is_visible():
        page.get_by_role("button", name="skip the guess").click()
    expect(page.locator("#qs-quick")).to_be_disabled()
    page.locator(".qs-item[data-name=objective]").click()
    page.locator("#qs-stop").click()
    expect(page.locator(".qs-says")).to_contain_text("was stopped at", timeout=SLOW)
    made = (server.home / "made.txt").read_text().splitlines()
    page.get_by_role("button", name="Go on with the quick version").click()
    live = page.locator(".qs-result[data-where='live, here']")
    expect(live.locator(".qs-verdict")).to_contain_text("holds", timeout=60_000)
    assert page.locator(".qs-result").count() == before + 1
    lines = (server.home / "made.txt").read_text().splitlines()
    assert made and lines[: len(made)] == made and len(lines) == len(set(lines)) == 9
    expect(live.locator(".qs-facts")).to_contain_text("seeds 0, 1, 2")


def test_by_keyboard_alone(open_page: Callable[..., Page]) -> None:
    page = open_page("/?tab=questions&q=rank")
    page.get_by_role("tab", name="Questions").focus()
    for _ in range(len(NAMES) + 4):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.type") == "radio":
            break
    page.keyboard.press("Space")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.value") == "1"
    page.keyboard.press("Enter")
    expect(page.locator("li.qs-choice.guess")).to_contain_text(find_experiment("rank").choices[1])
    expect(page.locator(":focus")).to_have_count(1)
    page.get_by_role("button", name="Next:").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name=find_experiment("which").question)).to_be_visible()
    page.locator("input[name=guess]").first.focus()
    page.keyboard.press("Escape")  # skips
    expect(panel(page)).to_contain_text(find_experiment("which").claim)


@pytest.mark.parametrize(("size", "scheme"), [
    pytest.param(WIDE, "light", id="wide-light"), pytest.param(NARROW, "dark", id="narrow-dark"),
    pytest.param(WIDE, "dark", id="wide-dark", marks=pytest.mark.slow),
    pytest.param(NARROW, "light", id="narrow-light", marks=pytest.mark.slow),
])  # fmt: skip
def test_for_everybody(open_page: Callable[..., Page], size: Any, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = open_page("/?tab=questions", size=size, scheme=scheme)
    found = []

    def check(name: str) -> None:
        shoot(page, f"questions-{name}-{'wide' if size is WIDE else 'narrow'}-{scheme}")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        small = page.evaluate("""() => [...document.querySelectorAll('#panel-questions *')].filter(n =>
            n.checkVisibility()
            && [...n.childNodes].some(c => c.nodeType === 3 && c.textContent.trim())
            && parseFloat(getComputedStyle(n).fontSize) < 14).map(n => n.outerHTML.slice(0, 80))""")
        assert small == [], name
        result = Axe().run(page, options={"resultTypes": ["violations"]})
        found.extend(f"{name}: {v['id']}: {n['html'][:160]} {n.get('failureSummary', '')[:300]}"
                     for v in result.response["violations"] for n in v["nodes"])  # fmt: skip

    page.wait_for_selector(".qs-choice")
    check("asked")
    skip_all(page)
    for name in [n for n in NAMES if stored_result(n)][:2]:
        page.locator(f".qs-item[data-name={name}]").click()
        page.wait_for_selector(".qs-plot .main-svg")
        page.get_by_text("the numbers").first.click()
        check(name)
    assert not found, "\n".join(found)
