"""The page as people use it: keys, files, faults, addresses, a server that goes away; and for everybody (axe)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from tests.browser.conftest import NARROW, WIDE, Server, ready, shoot, written

TABS = ("play", "adapt", "train", "compare", "spectra", "questions")
ROWS = "".join(f"colour : {c} | shape : {s}||A {c} {s}.\n" for c in ("red", "blue", "green") for s in ("box", "ball"))


# ---- how it looks, and for whom it works
@pytest.mark.parametrize(("size", "scheme"), [
    pytest.param(WIDE, "light", id="wide-light"), pytest.param(NARROW, "dark", id="narrow-dark"),
    pytest.param(WIDE, "dark", id="wide-dark", marks=pytest.mark.slow),
    pytest.param(NARROW, "light", id="narrow-light", marks=pytest.mark.slow)])  # fmt: skip
def test_every_tab_for_everybody(open_page: Callable[..., Page], run: int, size: Any, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(f"/?run={run}", size=size, scheme=scheme)
    found = []
    for tab in TABS:
        page.get_by_role("tab", name=tab.capitalize()).click()
        settled(page, tab)
        shoot(page, f"{tab}-{'wide' if size is WIDE else 'narrow'}-{scheme}")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{tab} is wider than the screen"
        result = Axe().run(page, options={"resultTypes": ["violations"]})
        found += [
            f"{tab}: {v['id']}: {n['html'][:160]} {n.get('failureSummary', '')[:300]}"
            for v in result.response["violations"]
            for n in v["nodes"]
        ]
    assert not found, "\n".join(found)


def settled(page: Page, tab: str) -> None:
    if tab == "train":
        page.wait_for_selector("#loss-plot .main-svg")
    if tab == "spectra":
        page.wait_for_selector("#spectrum-plot .main-svg")
    if tab == "compare":
        written(page)


def test_nothing_needs_scrolling_on_a_projector(open_page: Callable[..., Page], run: int) -> None:
    page = open_page(f"/?run={run}")
    for tab in TABS:
        page.get_by_role("tab", name=tab.capitalize()).click()
        settled(page, tab)
        assert page.evaluate("document.documentElement.scrollHeight") <= 740, tab


def test_nothing_is_smaller_than_fourteen_pixels(open_page: Callable[..., Page], run: int) -> None:
    page = open_page(f"/?run={run}")
    for tab in TABS:
        page.get_by_role("tab", name=tab.capitalize()).click()
        settled(page, tab)
        small = page.evaluate("""() => [...document.querySelectorAll('.ll *')].filter(n => n.checkVisibility()
            && [...n.childNodes].some(c => c.nodeType === 3 && c.textContent.trim())
            && parseFloat(getComputedStyle(n).fontSize) < 14).map(n => n.outerHTML.slice(0, 80))""")
        assert small == [], tab


def test_dark_is_remembered_and_figures_follow(open_page: Callable[..., Page], run: int) -> None:
    page = open_page(f"/?run={run}&tab=spectra")
    page.wait_for_selector("#spectrum-plot .main-svg")
    title = page.locator("#spectrum-plot .xtitle")
    before = title.evaluate("n => getComputedStyle(n).fill")
    page.get_by_role("button", name="Light or dark").click()
    expect(title).not_to_have_css("fill", before)
    page.reload()
    ready(page)
    assert page.evaluate("document.body.classList.contains('dark')")


# ---- keys and words
def test_tabs_and_layers_by_keyboard(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.get_by_role("tab", name="Adapt").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("tab", name="Train").get_attribute("aria-selected") == "true"
    assert page.locator("#panel-train").is_visible() and not page.locator("#panel-adapt").is_visible()
    page.keyboard.press("ArrowLeft")
    page.locator("#targets [data-name='down']").focus()
    before = page.evaluate("LoraLab.state.spec.targets.includes('down')")
    page.keyboard.press("Space")
    assert page.evaluate("LoraLab.state.spec.targets.includes('down')") != before
    page.locator(".lm-cell").first.focus()
    page.keyboard.press("Space")
    assert page.evaluate("LoraLab.state.spec.layers.length") == 29
    page.get_by_role("button", name="What the words mean").click()
    expect(page.get_by_role("dialog", name="What the words mean")).to_contain_text("section 4.1")
    page.keyboard.press("Escape")
    page.go_back()
    assert page.get_by_role("tab", name="Train").get_attribute("aria-selected") == "true"


def test_the_page_and_python_count_alike(open_page: Callable[..., Page]) -> None:
    """budget.js is lora_core.budget in the browser; Python's answer and its own must be one."""
    page = open_page()
    script = """async (spec) => {
        const main = document.querySelector('script[src*="main.js"]').src;
        const from = (name) => import(main.replace('main.js', name));
        const {budgetOf, loadOf, timeOf} = await from('budget.js'), {post} = await from('core.js');
        const {facts, config, about} = LoraLab.state, {tokens, labelled} = about;
        const asked = {model: facts.name, spec, config, data: {task: about.name}, tokens, labelled};
        const answer = await post('budget', asked);
        facts.s_per_flop = answer.s_per_flop ?? facts.s_per_flop;
        const mine = budgetOf(facts.coefficients, spec, loadOf(about, config));
        return {mine, theirs: answer.budget, time: timeOf(facts, mine, about, config), estimate: answer.time};
    }"""
    upper = list(range(10, 30))
    for spec in (
        {"targets": ["q", "v"], "rank": 8, "layers": "all"},
        {"targets": ["down"], "rank": 3, "layers": [12, 29]},
        {"targets": ["q", "k", "v", "o", "gate", "up", "down"], "rank": 64, "layers": upper},
        {"targets": ["q"], "rank": 8, "layers": "all", "train_A": False, "init": "pissa"},
    ):
        both = page.evaluate(script, {**spec, "alpha": 16})
        mine, theirs = both["mine"], both["theirs"]
        for name in ("trainable", "matrices", "total", "full_bytes"):
            assert mine[name] == theirs[name], name
        for name in ("fraction", "train_bytes", "full_train_bytes", "step_flops"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-6), name
        assert mine["file_bytes"] == pytest.approx(theirs["file_bytes"], rel=0.02)
        if both["estimate"]:  # the model may be busy; Python sees which rows come into one batch, the page their mean
            assert both["time"]["step_s"] == pytest.approx(both["estimate"]["step_s"], rel=0.04)
            assert both["time"]["total_s"] == pytest.approx(both["estimate"]["total_s"], rel=0.04)


# ---- faults stand beside the control
def test_faults_are_told_beside_their_control(open_page: Callable[..., Page]) -> None:
    page = open_page()
    fault = page.locator(".ad-card .ll-fault")
    page.fill("#rank input", "500")
    expect(fault).to_contain_text("the largest rank possible there is 192")
    assert page.locator("#rank input").get_attribute("aria-invalid") == "true"
    assert page.locator("#train-button").is_disabled() and page.locator("#budget .go").is_disabled()
    page.fill("#rank input", "0")
    expect(fault).to_contain_text("rank is 0")
    page.fill("#rank input", "8")
    expect(fault).to_be_empty()
    for name in page.evaluate("LoraLab.state.spec.targets"):
        page.locator(f"#targets [data-name='{name}']").click()
    expect(fault).to_contain_text("at least one matrix")
    page.locator("#targets [data-name='v']").click()
    expect(fault).to_be_empty()
    page.get_by_role("tab", name="Train").click()
    page.fill("#steps input", "0")
    expect(page.locator("#panel-train > .ll-fault")).to_contain_text("steps is 0")
    assert page.locator("#steps input").get_attribute("aria-invalid") == "true"
    assert page.locator(".toast-body").count() == 0


def test_a_model_that_is_none_is_told_and_the_old_one_stays(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.locator("#model-picker select").select_option("…")
    page.locator(".dt-other input").fill("no/such folder")
    page.get_by_role("button", name="Load it").click()
    expect(page.locator("#panel-adapt > .ll-fault")).to_contain_text("no model")
    assert page.evaluate("LoraLab.state.facts.name") == "smollm2-135m"
    assert page.locator("#model-picker select").input_value() == "smollm2-135m"


def test_without_the_default_model_another_can_be_picked(open_page: Callable[..., Page], server: Server) -> None:
    """As on a first start without network: no facts, an empty form, and why."""
    page = open_page()

    def without(route: Any) -> None:
        boot = route.fetch().json()
        boot |= {"facts": None, "fault": "cannot fetch the package", "run": None}
        boot["form"] |= {"spec": {}, "config": {}}
        route.fulfill(json=boot)

    page.route("**/lab/api/boot*", without)
    page.goto(f"{server.url}/?tab=adapt")
    expect(page.locator("#panel-adapt > .ll-fault")).to_have_text("cannot fetch the package")
    assert page.locator("#train-button").is_disabled()
    page.locator("#model-picker select").select_option("smollm2-135m")
    ready(page)
    expect(page.locator("#budget .ll-big")).to_have_text("460,800")
    expect(page.locator("#train-button")).to_be_enabled()


def test_a_file_of_ones_own(open_page: Callable[..., Page], tmp_path: Path) -> None:
    page = open_page()
    file = tmp_path / "<b>shapes.txt"
    file.write_text(ROWS)
    page.locator("#panel-adapt input[type=file]").set_input_files(file)
    page.wait_for_function("LoraLab.state.data.file")
    expect(page.locator("#task-picker select option:checked")).to_have_text("_b_shapes.txt")
    page.get_by_role("button", name="what is trained on").click()
    sheet = page.get_by_role("dialog", name="What is trained on")
    expect(sheet).to_contain_text("line 1")
    trained = "".join(sheet.locator("li").first.locator(".dt-on").all_inner_texts())
    assert trained.strip().startswith("A red box.")
    shoot(page, "what-is-trained-on")
    page.keyboard.press("Escape")
    bad = tmp_path / "bad.txt"
    bad.write_text("colour : red||A red box.\nno completion here\n")
    page.locator("#panel-adapt input[type=file]").set_input_files(bad)
    expect(page.locator("#panel-adapt > .ll-fault")).to_contain_text("bad.txt, line 2")
    assert page.evaluate("LoraLab.state.data.name") == "_b_shapes.txt"  # the last good choice stays


def test_texts_are_never_markup(open_page: Callable[..., Page], tmp_path: Path) -> None:
    page = open_page()
    file = tmp_path / "x.txt"
    evil = "<img src=x onerror=window.bad=1>${window.bad=2}{{7*7}}</script>"
    file.write_text("".join(f"{i} {evil}||{evil}\n" for i in range(9)))
    held: list[Route] = []
    page.route("**/lab/api/data?*", lambda route: held.append(route))
    page.locator("#panel-adapt input[type=file]").set_input_files(file)
    page.wait_for_function("LoraLab.state.data.file")
    page.get_by_role("button", name="what is trained on").click()
    sheet = page.get_by_role("dialog", name="What is trained on")
    expect(sheet).to_contain_text("Reading the rows…")  # not those of the task before
    for route in held:
        route.continue_()
    expect(sheet).to_contain_text("onerror")
    assert page.evaluate("window.bad") is None and page.locator("img[src=x]").count() == 0


def test_a_run_that_is_none(open_page: Callable[..., Page]) -> None:
    page = open_page("/?run=999&tab=train")
    expect(page.locator(".ll-away")).to_contain_text("no run '999'")
    assert "run=999" not in page.url


# ---- speed, and a server that goes away
def test_a_page_at_rest_wakes_nobody(open_page: Callable[..., Page]) -> None:
    page = open_page("/?tab=adapt")
    page.context.add_init_script("""window.frames_asked = 0;
      const own = window.requestAnimationFrame.bind(window);
      window.requestAnimationFrame = (f) => { window.frames_asked++; return own(f); };""")
    page.reload()
    ready(page)
    seen = []
    for _ in range(20):  # what moved at the start comes to its end
        before = page.evaluate("frames_asked")
        page.wait_for_timeout(1000)
        seen.append(page.evaluate("frames_asked") - before)
        if seen[-1] < 5:
            break
    endless = page.evaluate("""document.getAnimations().filter(a => a.effect.getComputedTiming().endTime === Infinity)
      .map(a => a.animationName)""")
    assert endless == []
    assert seen[-1] < 5, f"frames asked for in each second: {seen}"  # a loop asks for sixty


def test_a_click_on_a_matrix_is_answered_at_once(open_page: Callable[..., Page], run: int) -> None:
    page = open_page(f"/?run={run}&tab=spectra")
    page.wait_for_selector("#spectrum-plot .main-svg")
    for layer in (3, 7, 11, 15, 19):
        page.locator(f"#spectrum-heatmap [data-m='layers.{layer}.v']").click()
        expect(page.locator(".sp-right h2")).to_contain_text(f"layer {layer},")
    page.wait_for_function("LoraLab.clicks.length >= 6")
    clicks = sorted(page.evaluate("LoraLab.clicks.slice(1)"))
    print("click to picture, ms:", [round(c) for c in clicks])
    assert len(clicks) >= 5  # how long it took is printed; a busy machine is no reason to fail


def test_a_server_that_goes_away_is_told_and_comes_back(
    open_page: Callable[..., Page], server: Server, run: int
) -> None:
    page = open_page(f"/?run={run}&tab=spectra", offline_ok=True)
    page.wait_for_selector("#spectrum-plot .main-svg")
    server.stop()
    try:
        page.locator("#spectrum-heatmap [data-m='layers.22.v']").click()
        expect(page.locator(".ll-away")).to_contain_text("Trying again")
        assert page.locator(".toast-body").count() == 0
        shoot(page, "server-away")
    finally:
        server.start()
    expect(page.locator(".ll-away")).not_to_have_class("ll-away on")
    page.locator("#spectrum-heatmap [data-m='layers.23.v']").click()
    expect(page.locator(".sp-right h2")).to_contain_text("layer 23,")
