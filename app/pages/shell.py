"""What stands in the page before Gradio has drawn it: a head that fetches our files at once, and the name and the tabs,
so that something is seen while its modules load.

It also ends a loop: Gradio's first loader asks for a frame in each frame and goes on after it has left the page
(statustracker, Gradio 6.31), so a page at rest would wake the processors sixty times a second, and a training that has
them would wait each time. Its callbacks alone, known by what they do, get no frame once the page stands.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from app.pages.assets import Assets

REST = """(() => {
  const own = window.requestAnimationFrame, frame = own.bind(window);
  const loader = /^\\(\\)=>\\{[\\w$]+\\([\\w$]+,\\(performance\\.now\\(\\)-/;
  let there = false;
  window.requestAnimationFrame = (f) => there && loader.test(f) ? 0 : frame(f);
  addEventListener("lora-lab", () => { there = true; window.requestAnimationFrame = own; }, {once: true});
})();"""
# where the frame will stand, in its letters
STYLE = """#ll-first { position: absolute; inset: 0 0 auto; padding: 0 20px; z-index: 1; white-space: nowrap;
  overflow: hidden;
  font: 450 16px/41px Inter, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif; }
#ll-first b { display: block; padding-left: 30px; font-size: 17px; font-weight: 650; line-height: 52px; }
#ll-first span { margin: 0 20px 0 2px; opacity: .75; }
#ll-first p { margin: 12px 0 0; white-space: normal; opacity: .75; }"""
# Gradio's style sheet holds back the first paint; nothing of Gradio's is there to be styled before it
BLOCKS = b'<link rel="stylesheet" crossorigin href="./assets/'
LATER = BLOCKS.replace(b"crossorigin", b"crossorigin media=\"print\" onload=\"this.media='all'\"")


def shell(assets: Assets, tabs: tuple[tuple[str, str], ...], files: list[str]) -> Callable[[bytes], bytes]:
    """A function that puts it into Gradio's page; a page that is not as expected stays as it is.

    files: what is fetched at once, modules and style sheets
    """
    how = {"js": 'rel="modulepreload"', "css": 'rel="preload" as="style"'}
    fetched = "".join(f'<link {how[n.rpartition(".")[2]]} href="{assets.url(n)}">' for n in files)
    names = "".join(f"<span>{escape(text)}</span>" for _, text in tabs)
    head = f"<script>{REST}</script><style>{STYLE}</style>{fetched}"
    first = f'<div id="ll-first"><b>LoRA Lab</b>{names}<p>Starting: the first time this takes some seconds.</p></div>'

    def dressed(page: bytes) -> bytes:
        page = page.replace(BLOCKS, LATER)
        at, body = page.find(b"<script"), page.find(b"<gradio-app")
        if not 0 <= at < body:
            return page
        return b"".join((page[:at], head.encode(), page[at:body], first.encode(), page[body:]))

    return dressed
