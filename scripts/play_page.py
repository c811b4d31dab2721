"""Writes docs/play.html: the Play tab by itself, in one file that opens without a server. `make docs` runs it.

A browser loads no module from a file beside a page that was opened as a file, so the page's own modules and styles
stand in it as they are. A test holds it against them.
"""

from __future__ import annotations

from pathlib import Path

from app.playground import module, scoped_css

PAGE = Path(__file__).parents[1] / "docs" / "play.html"
HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>LoRA, a toy to play with</title>
<link rel="icon" href="data:,">
<style>
{css}
body {{ margin: 0; background: #f6f7f9; }} body.dark {{ background: #0b111e; }}
.ll-lab {{ max-width: 1640px; margin: 0 auto; padding: 10px 20px 16px; }}
.ll-lab h1 {{ margin: 0 0 8px; font-size: 17px; font-weight: 650; }}
@media (max-width: 900px) {{ .ll-lab {{ padding-inline: 14px; }} }}
</style>
</head>
<body>
<main class="ll-lab">
<div class="ll"><h1>LoRA Lab: Play</h1></div>
<div class="ll part-play" id="play"></div>
<p class="ll ll-note" id="after" hidden></p>
</main>
<script type="module">
{module}
// ---- this page: the address behind "#", since a file has no other that may change; the colours of the system
const dark = matchMedia("(prefers-color-scheme: dark)"), main = document.querySelector("main");
const paint = () => [main, document.body].forEach((n) => n.classList.toggle("dark", dark.matches));
dark.addEventListener("change", paint);
paint();
const part = playground(document.getElementById("play"), {{
  query: () => new URLSearchParams(location.hash.slice(1) || location.search),
  address: (change) => {{
    const said = new URLSearchParams(Object.entries(change).filter(([, v]) => v != null));
    history.replaceState(null, "", `#${{said}}`);
  }},
  next: () => {{
    const after = document.getElementById("after");
    after.textContent = "With a real language model: “make run”, then Adapt, Train, Compare and Spectra.";
    after.hidden = false;
    after.scrollIntoView();
  }},
}});
addEventListener("hashchange", () => location.reload());
part.begin();
</script>
</body>
</html>
"""


def page() -> str:
    return HTML.format(css=scoped_css().strip(), module=module().strip())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
