"""How the cost of a step grows with rank, sequence length and model size, and the law that it should follow.

    python -m benchmarks.bench_growth

Law of time: (4·P·T + head + 6·n·T) operations at the rate that this model reaches at rank 1; of memory: what `budget`
says. The first point that is off by more than a quarter is named with the term that the law leaves out. The picture
goes to docs/growth.svg and needs Chromium and Playwright, as the browser's tests do.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from benchmarks.kit import MODEL, RESULTS, ROOT, Peak, child, machine

RANKS = (1, 4, 16, 64, 256)
LENGTHS = (32, 128, 512, 1024, 2048)
SIZES = {"9M": (192, 6), "30M": (384, 12), "135M": (576, 30), "360M": (960, 32)}  # hidden size, layers
BIG = {"1.1B": (2048, 22), "1.5B": (2048, 28)}
# The term that is left out, below the setting of the best rate and above it.
BREAKS = {"rank": ("what a step costs at any rank", "6·n·T: thin products run below the rate of square ones"),
          "length": ("products of few rows, which run below the rate of many", "attention, which grows like T²"),
          "size": ("what is no product, a large share of a small model", "products beyond the cache")}  # fmt: skip


def shape(hidden: int, layers: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
                       num_key_value_heads=max(1, hidden // 192), intermediate_size=hidden * 8 // 3, vocab_size=49152,
                       max_position_embeddings=4096, tie_word_embeddings=True)  # fmt: skip


def side(kind: str, value: str) -> dict[str, float]:
    """Median seconds of a step and its peak memory at one setting, with what the law says of them."""
    import torch
    from transformers import AutoModelForCausalLM

    import lora_core as lc
    from lora_core.objective import CausalLM
    from lora_core.tasks.encode import Encoded

    rank, length, rows = 8, 128, 4
    if kind == "rank":
        rank = int(value)
    if kind == "length":
        length, rows = int(value), 1
    if kind == "size":
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(shape(*SIZES[value])).eval()
    else:
        model, _ = lc.load_model(MODEL, dtype="float32")
    for p in model.parameters():
        p.detach().sum()
    spec = lc.LoraSpec(targets=("q", "o", "gate", "up", "down"), rank=rank)  # k and v are too narrow for rank 256
    b = lc.budget(model, spec, tokens=rows * length, labelled=rows * length // 2)
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 49000, (length,), generator=g).tolist() for _ in range(rows)]
    with Peak() as peak:
        adapter = lc.attach(model, spec)
        objective = CausalLM(model, None, "")
        batch = objective.batch([Encoded(i, length // 2, False) for i in ids])
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4, fused=True)
        model.train()
        times = []
        for _ in range(4):
            at = time.perf_counter()
            (objective.loss(batch) / batch.labelled).backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - at)
    return {"step_s": statistics.median(times[1:]), "peak_bytes": peak.bytes, "flops": b.step_flops,
            "foretold_bytes": b.train_bytes - b.full_bytes}  # fmt: skip


def run() -> None:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    import lora_core as lc
    from lora_core.budget import meta_model

    figure = make_subplots(rows=2, cols=3, subplot_titles=[
        f"{what} against {over}" for what in ("time of a step", "peak memory") for over in (
            "rank", "tokens in a row", "model size")], vertical_spacing=0.16)  # fmt: skip
    lines = []
    settings = {"rank": list(map(str, RANKS)), "length": list(map(str, LENGTHS)), "size": list(SIZES)}
    for column, (kind, values) in enumerate(settings.items(), 1):
        points = [child("benchmarks.bench_growth", "--side", kind, v) for v in values]
        rate = points[0]["flops"] / points[0]["step_s"] if kind == "rank" else max(
            p["flops"] / p["step_s"] for p in points)  # fmt: skip
        law = [p["flops"] / rate for p in points]
        best = max(range(len(points)), key=lambda i: points[i]["flops"] / points[i]["step_s"])
        off = [(v, BREAKS[kind][i > best]) for i, (v, p, s) in enumerate(zip(values, points, law, strict=True))
               if p["step_s"] > 1.25 * s]  # fmt: skip
        off = list({why: (v, why) for v, why in reversed(off)}.values())[::-1]  # the first of each term
        line: dict[str, Any] = {"row": f"growth {kind}", "at": values, "law_s": law, "breaks": off}
        line |= {k: [p[k] for p in points] for k in points[0]}
        if kind == "size":
            spec = lc.LoraSpec(rank=8)
            metas = {n: lc.budget(meta_model(shape(*s)), spec, tokens=512).train_bytes for n, s in BIG.items()}
            line["foretold_bytes_on_meta"] = metas
        lines.append(line)
        print(f"growth {kind}: " + ", ".join(f"{v}: {p['step_s']:.2f} s (law {s:.2f}), {p['peak_bytes'] / 1e6:.0f} MB "
              f"(foretold {p['foretold_bytes'] / 1e6:.0f})" for v, p, s in zip(values, points, law, strict=True)),
              *(f"; the law breaks at {v}: {why}" for v, why in off), flush=True)  # fmt: skip
        x: list[Any] = values if kind == "size" else [int(v) for v in values]
        for row, measured, foretold in ((1, [p["step_s"] for p in points], law), (
                2, [p["peak_bytes"] / 1e6 for p in points], [p["foretold_bytes"] / 1e6 for p in points])):  # fmt: skip
            first = row == column == 1
            figure.add_trace(go.Scatter(x=x, y=measured, name="measured", mode="lines+markers", showlegend=first,
                                        line_color="#c2410c"), row, column)  # fmt: skip
            figure.add_trace(go.Scatter(x=x, y=foretold, name="law", mode="lines", showlegend=first,
                                        line={"color": "#64748b", "dash": "dash"}), row, column)  # fmt: skip
            figure.update_yaxes(type="log", title_text="s" if row == 1 else "MB", row=row, col=column)
            title = {"rank": "rank r", "length": "tokens", "size": "parameters"}[kind]
            scale = "category" if kind == "size" else "log"
            figure.update_xaxes(type=scale, row=row, col=column, title_text=title)
    figure.update_layout(title=f"Cost of a training step on {machine()['chip']}: see where the lines part",
                         template="simple_white", height=720)  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "growth.jsonl").open("a") as f:
        f.write("".join(json.dumps({**line, "machine": machine()}) + "\n" for line in lines))
    draw(figure, ROOT / "docs" / "growth.svg")


def draw(figure: Any, path: Path) -> None:
    """Plotly's own SVG of a figure."""
    from playwright.sync_api import sync_playwright

    from tests.browser_path import browser_path

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        page = browser.new_page()
        page.set_content(figure.to_html(include_plotlyjs=True))
        image = page.evaluate("Plotly.toImage(document.querySelector('.plotly-graph-div'), "
                              "{format: 'svg', width: 1280, height: 720})")  # fmt: skip
        browser.close()
    path.write_text(unquote(image.partition(",")[2]), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        print(json.dumps(side(sys.argv[2], sys.argv[3])))
    else:
        run()
