"""The main job on the real model: choose, train, come back in the middle, compare, look inside."""

from __future__ import annotations

from collections.abc import Callable

from playwright.sync_api import Page, expect

from tests.browser.conftest import SLOW, Server, ready, shoot, written

IDS = ("model-picker task-picker targets rank alpha steps budget train-button stop-button loss-plot run-status prompt "
       "compare-button base-output adapted-output spectrum-heatmap spectrum-plot").split()  # fmt: skip


def test_every_control_is_there_once_from_the_start(open_page: Callable[..., Page]) -> None:
    page = open_page()
    for id in IDS:
        assert page.locator(f"[id='{id}']").count() == 1, id
    twice = page.evaluate(
        "[...document.querySelectorAll('[id]')].map(n => n.id).filter((id, i, all) => all.indexOf(id) !== i)"
    )
    assert twice == []


def test_choose_train_reload_compare_and_look(open_page: Callable[..., Page], server: Server) -> None:
    page = open_page()
    shoot(page, "1-first-visit")

    # choose: the task, the matrices, the rank; the budget answers at once
    page.locator("#task-picker select").select_option("task:sentiment")
    page.wait_for_function("LoraLab.state.about?.name === 'sentiment'")
    for name in ("q", "o"):  # q off, o on: v and o stay
        page.locator(f"#targets [data-name='{name}']").click()
    page.fill("#rank input", "4")
    expect(page.locator("#budget")).to_contain_text(f"{30 * 4 * (192 + 576 + 576 + 576):,}")
    assert page.locator("#targets [data-name='o']").get_attribute("aria-pressed") == "true"
    assert page.locator("#targets [data-name='q']").get_attribute("aria-pressed") == "false"
    shoot(page, "2-chosen")

    # train: few steps, few held-out rows
    page.get_by_role("tab", name="Train").click()
    page.fill("#steps input", "12")
    page.locator("input[data-name=batch_size]").fill("2")
    page.get_by_text("more", exact=True).click()
    page.locator("input[data-name=eval_rows]").fill("4")
    page.keyboard.press("Escape")
    page.locator("#train-button").click()
    page.wait_for_function("/is training: step [1-9]/.test(document.querySelector('#run-status').textContent)")
    run = page.evaluate("LoraLab.state.run")
    assert f"run={run}" in page.url and page.locator("#run-status").get_attribute("data-status") == "running"
    assert page.locator("#stop-button").is_visible() and not page.locator("#train-button").is_visible()
    shoot(page, "3-training")

    # come back in the middle: the address has the run, and it goes on
    page.reload()
    ready(page)
    status = page.locator("#run-status")
    expect(status).to_contain_text(f"run {run}", timeout=SLOW)
    assert page.evaluate("LoraLab.state.run") == run
    assert page.locator("#steps input").input_value() == "12" and page.locator("#rank input").input_value() == "4"
    expect(status).to_have_attribute("data-status", "done", timeout=SLOW)
    view = server.ask(f"run?run={run}")
    assert view["step"] == 12 and view["loss"] < view["base_loss"]
    expect(page.locator("#panel-train .tr-say")).to_contain_text(f"{view['base_loss']:.2f} to {view['loss']:.2f}")
    page.wait_for_selector("#loss-plot .main-svg")
    assert page.locator("#loss-plot").inner_text().find(f"base model {view['base_loss']:.2f}") >= 0
    shoot(page, "4-trained")

    # compare
    page.get_by_role("tab", name="Compare").click()
    page.fill("#prompt textarea", "a warm and funny film")
    page.locator("#compare-button").click()
    written(page)
    assert page.locator("#base-output").inner_text().strip() and page.locator("#adapted-output").inner_text().strip()
    assert page.locator(".cp-tok").count() >= 1
    expect(page.locator(".cp-loss")).to_contain_text(f"{view['loss']:.2f}")
    shoot(page, "5-compared")

    # look inside
    page.get_by_role("tab", name="Spectra").click()
    page.wait_for_selector("#spectrum-plot .main-svg")
    cell = page.locator("#spectrum-heatmap [data-m='layers.12.v']")
    cell.click()
    expect(page.locator(".sp-right h2")).to_have_text("layer 12, v (value)")
    expect(page.locator(".sp-right .ll-say")).to_contain_text("of this update")
    assert cell.get_attribute("aria-selected") == "true" and "m=layers.12.v" in page.url
    page.keyboard.press("ArrowRight")
    expect(page.locator(".sp-right h2")).to_have_text("layer 13, v (value)")
    shoot(page, "6-inside")

    # the address alone brings all of it back
    page.reload()
    page.wait_for_selector("#spectrum-plot .main-svg")
    expect(page.locator(".sp-right h2")).to_have_text("layer 13, v (value)")
    assert page.get_by_role("tab", name="Spectra").get_attribute("aria-selected") == "true"


def test_a_run_is_stopped_and_its_adapter_kept(open_page: Callable[..., Page], server: Server) -> None:
    page = open_page("/?tab=train")
    page.locator("#task-picker select").select_option("task:sentiment", force=True)
    page.wait_for_function("LoraLab.state.about?.name === 'sentiment'")
    page.fill("#steps input", "500")
    page.locator("input[data-name=batch_size]").fill("1")
    page.get_by_text("more", exact=True).click()
    page.locator("input[data-name=eval_rows]").fill("2")
    page.keyboard.press("Escape")
    page.locator("#train-button").click()
    page.wait_for_function("/is training: step [1-9]/.test(document.querySelector('#run-status').textContent)")
    page.locator("#stop-button").click()
    expect(page.locator("#run-status")).to_have_attribute("data-status", "stopped", timeout=SLOW)
    assert server.ask(f"run?run={page.evaluate('LoraLab.state.run')}")["adapter"]
    expect(page.get_by_role("button", name="steps left")).to_be_visible()
    assert page.locator("#train-button").is_visible()
