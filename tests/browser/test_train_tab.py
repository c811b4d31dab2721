"""Train in the browser: what happened in a sentence, the spectrum as it grew, a walked step, runs over each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import NARROW, SLOW, Server, shoot


def test_the_first_visit_says_what_the_recorded_run_did(open_page: Callable[..., Page], server: Server) -> None:
    page = open_page("/?tab=train&run=0")
    view = server.ask("run?run=0")
    said = page.locator("#panel-train > .tr-say")
    expect(said).to_have_text(view["sentence"])
    assert "‖ΔW‖ is" in view["sentence"] and "another most probable word" in view["sentence"]


def test_the_spectrum_grows_and_the_slider_replays_it(open_page: Callable[..., Page], server: Server, run: int) -> None:
    page = open_page(f"/?tab=train&run={run}&m=layers.12.v")
    page.wait_for_selector("#film-plot .main-svg")
    film = server.ask(f"film?run={run}&m=layers.12.v")
    title, say, slide = page.locator(".tr-live h2"), page.locator(".tr-film-say"), page.locator("#film")
    expect(title).to_have_text("ΔW of layer 12, v")
    assert int(slide.input_value()) == len(film["steps"]) - 1

    slide.focus()
    page.keyboard.press("Home")
    expect(say).to_have_text("Step 0: B = 0, so every σ is 0 and the model is still the base model.")
    page.keyboard.press("ArrowRight")
    expect(say).to_contain_text(f"Step {film['steps'][1]}: σ₁ = ")
    assert slide.get_attribute("aria-valuetext") == f"step {film['steps'][1]}"
    drawn = page.evaluate("document.querySelector('#film-plot').data.at(-1).y")
    assert drawn == film["sigma"][1] and drawn[0] > 0
    page.keyboard.press("End")
    expect(say).to_contain_text(f"Step {film['steps'][-1]}: ")

    # a cell of the strip chooses the matrix of all tabs
    cell = page.locator("#panel-train [data-m='layers.20.q']")
    cell.click()
    expect(title).to_have_text("ΔW of layer 20, q")
    assert cell.get_attribute("aria-selected") == "true" and "m=layers.20.q" in page.url
    page.keyboard.press("ArrowRight")
    expect(title).to_have_text("ΔW of layer 21, q")
    page.get_by_role("tab", name="Spectra").click()
    expect(page.locator("#panel-spectra")).to_contain_text("layer 21, q")


def test_one_real_step_is_walked_and_walked_back(open_page: Callable[..., Page], server: Server, run: int) -> None:
    page = open_page(f"/?tab=train&run={run}&m=layers.12.v")
    page.locator("#step-button").click()
    stage = page.locator(".wk-stage.now")
    expect(stage).to_have_attribute("data-stage", "forward", timeout=SLOW)
    expect(stage).to_contain_text("rows went through the model")
    expect(stage).to_contain_text("at this step")
    assert stage.locator(".wk-tok").count() > 0
    for name, words in (("gradient", "only B learns in this step"), ("adam", "Adam moves an entry by about the rate"),
                        ("delta", "‖ΔW‖ went from 0 to ")):  # fmt: skip
        next = page.locator("#walk-next")
        expect(next).to_be_enabled(timeout=SLOW)
        next.click()  # at once: what is still being computed is waited for
        expect(stage).to_have_attribute("data-stage", name, timeout=SLOW)
        expect(stage).to_contain_text(words)
    expect(page.locator(".wk-where")).to_contain_text("step 1 of 12; layer 12, v (value)")
    shoot(page, "train-walk")
    expect(page.locator("#walk-next")).to_have_text("Step 2")
    page.keyboard.press("ArrowLeft")
    expect(stage).to_have_attribute("data-stage", "adam")
    for _ in range(2):
        page.keyboard.press("ArrowLeft")
    expect(stage).to_have_attribute("data-stage", "forward")
    page.get_by_role("button", name="Close").last.click()
    assert not page.locator("#walk").is_visible()


@pytest.mark.slow
def test_runs_over_each_other_with_what_differs_and_by_size(open_page: Callable[..., Page], server: Server,
                                                            run: int) -> None:  # fmt: skip
    config: dict[str, Any] = {"steps": 2, "batch_size": 2, "eval_rows": 4, "max_tokens": 64, "seed": 0}
    made = server.ask("train", {"model": "smollm2-135m", "spec": {"targets": ["v"], "rank": 1}, "config": config,
                                "data": {"task": "sentiment"}})  # fmt: skip
    server.ended(made["run"])
    page = open_page(f"/?tab=train&run={run}")
    page.locator(f".tr-run[data-run='{made['run']}'] .tr-over").click()
    table = page.locator(".tr-differs")
    expect(table).to_contain_text("matrices")
    head = table.locator("thead th").all_inner_texts()
    assert head == [f"run {run}", f"run {made['run']}"]
    rows = {r[0]: r[1:] for r in (line.split("\t") for line in table.locator("tbody tr").all_inner_texts())}
    assert rows["matrices"] == ["q v", "v"] and rows["r"] == ["4", "1"] and rows["steps"] == ["12", "2"]
    assert "seed" not in rows and "batch" not in rows
    page.get_by_role("button", name="by size").click()
    page.wait_for_selector("#pareto-plot .main-svg")
    assert not page.locator("#loss-plot").is_visible()
    expect(page.locator(".tr-pareto-say")).to_contain_text("on the front")
    names = page.evaluate("document.querySelector('#pareto-plot').data.flatMap((t) => t.customdata ?? [])")
    assert {run, made["run"]} <= set(names)
    shoot(page, "train-size")


def test_what_is_hit_and_what_hits_nothing(open_page: Callable[..., Page]) -> None:
    page = open_page("/?tab=adapt&run=0")
    hits = page.locator("#hits")
    expect(hits).to_have_text("hits q 30 modules in 30 layers, v 30 in 30")
    page.get_by_role("button", name="every other").click()
    expect(hits).to_have_text("hits q 15 modules in 15 layers, v 15 in 15")
    page.evaluate("""() => { const k = LoraLab.state.facts.matrices.find((m) => m.name === 'k'), v = LoraLab.state.facts.matrices.find((m) => m.name === 'v');
        v.by_layer = v.by_layer.map((n, l) => l % 2 ? 0 : n); k.also = {name: 'v', layers: k.by_layer.map((_, l) => l).filter((l) => l % 2)}; }""")  # noqa: E501
    page.locator("#targets [data-name='k']").click()
    expect(page.locator("#panel-adapt")).to_contain_text("v hits nothing in the chosen layers: there k is also v")
    expect(hits).to_contain_text("k is also v in 15 of them")


def test_train_on_a_phone(open_page: Callable[..., Page], run: int) -> None:
    page = open_page(f"/?tab=train&run={run}", size=NARROW)
    page.wait_for_selector("#film-plot .main-svg")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator("#step-button").click()
    expect(page.locator(".wk-stage.now")).to_have_attribute("data-stage", "forward", timeout=SLOW)
    box = page.locator("#walk").bounding_box()
    assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 390
    shoot(page, "train-walk-narrow")
