"""The menu of runs with ten thousand of them: the newest, further ones, a search; and answers that are cut off."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from app.runs.run import RunRequest
from app.runs.store import RunStore
from tests.browser.conftest import NARROW, Server, own_home, shoot

MANY = 10_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = own_home(tmp_path_factory.mktemp("many"))
    store = RunStore(home)
    asked = RunRequest(model="smollm2-135m", task="pirate", config={"steps": 60}).to_dict()
    with store.db.transaction():
        for i in range(1, MANY + 1):
            text = json.dumps(asked | {"title": f"speech {i}" if i % 1000 == 7 else None})
            names = "request, status, created, step, steps, loss"
            store.db.execute(f"INSERT INTO runs ({names}) VALUES (?, 'done', ?, 60, 60, 1.5)", (text, float(i)))
    for id in range(MANY - 100, MANY + 1):
        store.folder(id).mkdir()
        steps = [{"kind": "step", "step": s, "steps": 60, "loss": 3 - s / 40} for s in range(1, 61)]
        text = "".join(json.dumps(e, separators=(",", ":")) + "\n" for e in steps)
        (store.folder(id) / "events.jsonl").write_text(text)
    store.close()
    found = Server(home)
    found.start()
    yield found
    found.stop()


def test_the_newest_are_there_and_the_rest_is_found(open_page: Callable[..., Page]) -> None:
    page = open_page("/?tab=train")
    lines, find = page.locator(".tr-run"), page.get_by_label("Find runs")
    expect(lines).to_have_count(31)  # with the recorded one
    expect(lines.first).to_contain_text("run 10000")
    expect(page.locator(".tr-runs")).to_contain_text("10,000")
    shoot(page, "runs-many")
    more = page.get_by_role("button", name="show more")
    more.scroll_into_view_if_needed()
    more.click()
    expect(lines).to_have_count(61)
    expect(lines.nth(59)).to_contain_text("run 9941")
    expect(lines.last).to_contain_text("recorded")
    find.fill("speech 3007")
    expect(lines).to_have_count(1)
    expect(lines.first).to_contain_text("run 3007")
    expect(page.locator(".tr-runs")).to_contain_text("1 found")
    shoot(page, "runs-found")
    lines.first.get_by_role("button", name="Open run 3007").or_(lines.first.locator(".tr-open")).first.click()
    expect(page.locator("#run-status")).to_contain_text("run 3007")
    find.fill("no such words")
    expect(page.get_by_text("No run has all of these words.")).to_be_visible()
    find.fill("")
    expect(lines).to_have_count(31)
    took = page.evaluate("""async () => { const at = performance.now();
        for (let i = 0; i < 5; i++) await (await fetch("lab/api/runs?text=speech+" + i)).json();
        return (performance.now() - at) / 5; }""")
    assert took < 1500, took  # a tenth of that where nothing else is done
    page.set_viewport_size(NARROW)
    find.scroll_into_view_if_needed()
    shoot(page, "runs-many-narrow")


def test_answers_that_are_cut_off_are_asked_for_again(open_page: Callable[..., Page]) -> None:
    page = open_page("/?tab=train&run=10000", offline_ok=True)
    expect(page.locator("#run-status")).to_contain_text("run 10000")
    cut: list[str] = []

    def halve(route: Any) -> None:
        answer = route.fetch()
        cut.append(route.request.url)
        route.fulfill(status=200, content_type="application/json", body=answer.text()[: len(answer.text()) // 2])

    page.route("**/lab/api/run*", halve)
    page.locator(".tr-run", has_text="run 9990").locator(".tr-open").click()
    expect(page.locator(".ll-away")).to_contain_text("Trying again")
    assert cut
    page.unroute_all(behavior="ignoreErrors")  # one may be on its way
    expect(page.locator(".ll-away")).not_to_have_class("ll-away on", timeout=20_000)
    expect(page.locator("#run-status")).to_contain_text("run 9990", timeout=20_000)
