"""What LoRA costs: storage, switching tasks, latency."""

from __future__ import annotations

import re
from collections.abc import Sequence

from app.figures import BASE, EDGE, LINE, WARM_FILL, WARM_SOFT, Figure
from app.figures_experiments.panels import (
    PAPER,
    PAPER2,
    STYLES,
    THIRD,
    Panel,
    Paper,
    axis,
    bars,
    build,
    categories,
    curve,
    dots,
    level,
    log_axis,
    mark,
    note,
    number,
    unique,
    values,  # fmt: skip
)
from lora_core.experiments.experiment import Row
from lora_core.experiments.verdicts import by, median


def size(text: str) -> list[float]:
    """The sizes in a text, in bytes: "350 GB -> 35 MB" gives 3.5e11 and 3.5e7."""
    unit = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    return [float(n) * unit[u] for n, u in re.findall(r"([\d.]+) ([kMGT]B)", text)]


def storage(rows: Sequence[Row], paper: Paper) -> Figure:
    tasks = by(rows, kind="tasks")
    n = [r["tasks"] for r in tasks]
    ours = [100 * r["shared"] / r["copies"] for r in tasks]
    base, adapter = size(paper["checkpoint"])
    theirs = [100 * (base + k * adapter) / (k * base) for k in n]
    left = Panel(
        title="N tasks, in % of N full copies",
        data=[*curve([(k, [y]) for k, y in zip(n, theirs)], "the paper, GPT-3", PAPER, unit=" %"),
              *curve([(k, [y]) for k, y in zip(n, ours)], "one base and N adapters", unit=" %")],
        x=log_axis("tasks N", ticks=(1, 2, 5, 10, 30, 100)), y=log_axis("size (% of N copies)", [ours, theirs],
                                                                        ticks=(1, 3, 10, 30, 100)),
        lines=[level(100, BASE)], labels=[note(2, "N full copies", color=BASE)])  # fmt: skip
    memory = by(rows, kind="memory")
    names = {"full": "full", "lora": "LoRA"}
    x = [names[r["method"]] for r in memory]
    parts = (("weights", BASE), ("gradients", WARM_FILL), ("optimiser", WARM_SOFT), ("activations", EDGE),
             ("copies", LINE))  # fmt: skip
    stack = [bars(x, [r[p] / 1e9 for r in memory], p, c, text=[f"{r[p] / 1e9:.2f} GB by the formula" for r in memory])
             for p, c in parts if any(r[p] for r in memory)]  # fmt: skip
    peaks = {m: [r["peak"] / 1e9 for r in by(rows, kind="peak", method=m)] for m in names}
    right = Panel(
        title="training memory (GB)", data=[*stack, *curve([(names[m], v) for m, v in peaks.items()], "measured peak",
                                                           THIRD, unit=" GB", line=False)],
        x={"type": "category", "range": [-0.6, 1.6]},
        y=axis("memory (GB)", range=[0, 1.12 * max(map(max, peaks.values()))]))  # fmt: skip
    share = sum(peaks["lora"]) / len(peaks["lora"]) / (sum(peaks["full"]) / len(peaks["full"]))
    before, after = size(paper["training memory"])
    say = (f"With one task, base and adapter take {ours[0]:.1f} % of a full copy; with {n[-1]} tasks, {ours[-1]:.1f} %."
           f" Training needs {share:.0%} of the memory of full fine-tuning (the paper: {after / before:.0%}).")
    table = [["tasks", "full copies", "base and adapters", "share", "the paper's share"],
             *([str(r["tasks"]), f"{r['copies'] / 1e9:.2f} GB", f"{r['shared'] / 1e9:.2f} GB", f"{a:.1f} %",
                f"{b:.1f} %"] for r, a, b in zip(tasks, ours, theirs))]  # fmt: skip
    return build("What is stored, and what training takes", say, [left, right], table, gap=0.14)


def switch(rows: Sequence[Row], paper: Paper) -> Figure:
    ways = unique(rows, "way")
    styles = dict(zip(unique(rows, "dtype"), STYLES))
    data, off, changed = [], [], []
    for dtype, style in styles.items():
        mine = [by(rows, way=w, dtype=dtype)[0] for w in ways]
        load = mine[0]["load_ms"]
        mids = [median(r["ms"]) for r in mine]
        points = [*((w, [m[0]]) for w, m in zip(ways, mids)), ("load a copy", [load])]
        data += dots(points, dtype, style, unit=" ms", ends=[*((m[1], m[2]) for m in mids), (load, load)])
        mine_changed = [(w, [100 * r["entries_changed"]]) for w, r in zip(ways, mine)]
        changed += mine_changed
        off += dots(mine_changed, dtype, style, unit=" %")
    left = Panel(title="one switch takes (ms, median)", data=data, y=categories([*ways, "load a copy"]),
                 x=log_axis("time (ms)", [[t["x"][i]] for t in data for i in range(len(t["x"]))]))  # fmt: skip
    right = Panel(title=f"entries of W0 that differ after {rows[0]['switches']} switches", data=off,
                  y=categories(ways), x=axis("entries (%)", values(changed)))  # fmt: skip
    table = [["way", "numbers in", "ms", "entries changed", "drift", "kept aside"],
             *([r["way"], r["dtype"], number(median(r["ms"])[0]), f"{100 * r['entries_changed']:.2g} %",
                number(r["drift"]), f"{r['bytes_kept'] / 1e6:.0f} MB"] for r in rows)]  # fmt: skip
    worst = max(rows, key=lambda r: r["entries_changed"])
    share = median(worst["ms"])[0] / worst["load_ms"]
    say = (f"To {worst['way']} takes {share:.0%} of the time of loading a copy (left), and leaves"
           f" {100 * worst['entries_changed']:.2g} % of the entries changed in {worst['dtype']} (right).")  # fmt: skip
    return build("Switching tasks: how long, and what stays of it", say, [left, right], table, gap=0.24, aside=True)


def latency(rows: Sequence[Row], paper: Paper) -> Figure:
    sizes = list(dict.fromkeys((r["batch"], r["length"]) for r in rows))
    ways = [w for w in unique(rows, "way") if w != "base"]
    here = {s: f"{s[0]} × {s[1]}" for s in sizes}
    theirs = [t.replace("/", " × ") + " (paper)" for t in paper["batch/length"]]
    data, groups = [], []
    for way, style in zip(ways, STYLES):
        points, ends = [], []
        for s in sizes:
            base, mine = (by(rows, batch=s[0], length=s[1], way=w) for w in ("base", way))
            if mine:
                mid, least, most = median([a / b for a, b in zip(mine[0]["ms"], base[0]["ms"])])
                points.append((here[s], [mid]))
                ends.append((least, most))
        groups += [list(e) for e in ends]
        data += dots(points, way, style, what="×", ends=ends)
    for key, style in zip([k for k in paper if k.startswith("Adapter")], (PAPER, PAPER2)):
        ratio = [(t, [a / b]) for t, a, b in zip(theirs, paper[key], paper["merged LoRA ms"])]
        groups += values(ratio)
        data += dots(ratio, f"the paper, {key.removesuffix(' ms')}", style, what="×")
    flat = [v for g in groups for v in g]
    room = max(flat) - min(flat)
    panel = Panel(title="by batch × tokens", data=data,
                  y=categories([*here.values(), *theirs]),
                  x=axis("time / time of the bare model", range=[min(flat) - 0.06 * room, max(flat) + 0.06 * room]),
                  lines=[mark(1)])  # fmt: skip
    table = [["batch × tokens", "way", "ms (median)", "relative"],
             *([here[s], r["way"], number(median(r["ms"])[0]), number(median([a / b for a, b in zip(
                 r["ms"], by(rows, batch=s[0], length=s[1], way="base")[0]["ms"])])[0])]
               for s in sizes for r in by(rows, batch=s[0], length=s[1]))]  # fmt: skip
    say = "On the dashed line: as fast as the bare model. Bars: 95 % interval of the median of runs side by side."
    return build("Forward time", say, [panel], table, aside=True)
