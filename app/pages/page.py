"""The page itself: a Gradio app of parts, each drawn by a module of app/static into a template that never changes.

Why so: `gr.Plot` makes its figure anew at each update, and a changing template is evaluated as JavaScript, so texts of
models and files must not be in one. A part's template is one empty element; its module writes into it with textContent.
The tabs are the frame's own: Gradio 6.31 builds a tab's content at its first visit (whatever `render_children` says),
and here every control is there from the start.

Reading and small changes go over the routes in `api`; writing text is Gradio's: a queued event that streams.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import json  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from typing import Any  # noqa: E402

import gradio as gr  # noqa: E402
from gradio.themes import Base  # noqa: E402

from app.pages import compare, programs, train  # noqa: E402
from app.pages.assets import Assets  # noqa: E402
from app.pages.lab import Lab  # noqa: E402
from app.pages.visitor import asked_by  # noqa: E402

TABS = (("play", "Play"), ("adapt", "Adapt"), ("train", "Train"), ("compare", "Compare"), ("spectra", "Spectra"),
        ("questions", "Questions"))
FONTS = ["Inter", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Noto Sans", "sans-serif"]
PAPER, PAPER_DARK, INK, INK_DARK = "#f6f7f9", "#0b111e", "#0f172a", "#e8edf5"  # painted before the style sheet comes
THREADS = 16  # of Gradio's callbacks; at its usual 40 they share the threads that answer everything else
SESSIONS = 200  # that Gradio remembers; nothing precious is in them
REST_S = 0.03  # between two looks of Gradio's queue when it is empty; its own 1 ms costs a twentieth of a processor
PRIVATE: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def build(lab: Lab) -> gr.Blocks:
    """The Blocks: the frame, one part a tab, and the one event that streams."""
    with gr.Blocks(title="LoRA Lab", fill_width=True, analytics_enabled=False) as page:
        part("frame", {"tabs": TABS})
        part("play", {})
        part("adapt", {})
        part("train", {"more": train.MORE})
        texts = part("compare", {})
        part("spectra", {})
        part("questions", {})

        def write(asked: dict[str, Any], request: gr.Request) -> Iterator[dict[str, Any]]:
            who = request.request.scope["lora_lab.visitor"]  # type: ignore[union-attr]
            yield from asked_by(who, compare.stream(lab, asked if isinstance(asked, dict) else {}))

        # several at once, since a newer question ends the older one; the model itself is used by one at a time
        texts.submit(write, texts, texts, trigger_mode="multiple", concurrency_id="model", concurrency_limit=8,
                     **PRIVATE)  # fmt: skip
        programs.endpoints(lab)
    page.max_threads = THREADS
    page.state_session_capacity = SESSIONS
    page.queue(api_open=False, max_size=64)
    page._queue.sleep_when_free = REST_S  # there is no other way to set it
    return page


def part(name: str, value: Any) -> gr.HTML:
    """A part of the page that a module draws; a function, since a subclass of gr.HTML writes a .pyi beside its file."""
    mount = f"LoraLab.mount({json.dumps(name)}, element, {{props, trigger, watch}})"
    return gr.HTML(value, html_template="<div></div>", apply_default_css=False, elem_id=f"part-{name}",
                   js_on_load=mount)  # fmt: skip


def files(assets: Assets, room: bool = False) -> list[str]:
    """Our modules and styles, fetched before Gradio asks for them (see `shell`); those of a room in a room alone."""
    return [n for n in assets.files if n.endswith((".js", ".css")) and n != "plotly.min.js"
            and (room or not n.startswith("room"))]  # fmt: skip


def head(assets: Assets, room: bool = False) -> str:
    """What Gradio puts into the page's head: the styles, the modules, and a list for parts that come before them.

    room: with the modules of a room, of which a page elsewhere knows nothing
    """
    early = ("window.LoraLab = {waiting: [], mount(...part) { this.waiting.push(part); }, "
             f"plotly: {json.dumps(assets.url('plotly.min.js'))}}};")  # fmt: skip
    lines = (
        f'<link rel="stylesheet" href="{assets.url("theme.css")}">',
        f'<link rel="stylesheet" href="{assets.url("parts.css")}">',
        f'<link rel="stylesheet" href="{assets.url("spectra.css")}">',
        f'<link rel="stylesheet" href="{assets.url("frame.css")}">',
        f'<link rel="stylesheet" href="{assets.url("train.css")}">',
        f'<link rel="stylesheet" href="{assets.url("compare.css")}">',
        f'<link rel="icon" type="image/svg+xml" href="{assets.url("icon.svg")}">',
        f"<script>{early}</script>",
        f'<script type="module" src="{assets.url("main.js")}"></script>',
        f'<link rel="stylesheet" href="{assets.url("room.css")}">' if room else "",
        f'<script type="module" src="{assets.url("room.js")}"></script>' if room else "",
    )
    return "".join(lines)


def theme() -> Base:
    """System fonts, and the paper's colour before the style sheet is there."""
    return Base(font=FONTS, font_mono=["ui-monospace", "monospace"]).set(
        body_background_fill=PAPER, body_background_fill_dark=PAPER_DARK,
        body_text_color=INK, body_text_color_dark=INK_DARK)  # fmt: skip
