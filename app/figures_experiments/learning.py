"""What is learnt, and how well: rank, matrices, scaling, objectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.figures import BASE, EDGE, WARM_FILL, Figure
from app.figures_experiments.panels import (
    CONTROL,
    FOURTH,
    OURS,
    PAPER,
    PAPER2,
    SECOND,
    THIRD,
    Panel,
    Paper,
    axis,
    build,
    categories,
    curve,
    dots,
    level,
    log_axis,
    mark,
    note,
    number,
    plus_minus,
    scores,  # fmt: skip
    seeds_at,
    unique,
    values,
)
from lora_core.experiments.experiment import Row
from lora_core.experiments.verdicts import by, interval, paired, per_seed


def rank(rows: Sequence[Row], paper: Paper) -> Figure:
    easy, hard = by(rows, task="sentiment"), [r for r in by(rows, task="new-language") if r["rank"] > 0]
    full = by(rows, task="new-language", rank=0)  # full fine-tuning of the same matrices
    points = [(r, [100 * v for v in vs]) for r, vs in seeds_at(easy, "accuracy", "rank")]
    theirs = scores(paper, len(paper["rank"]))
    data = []
    for (name, (ys, pm)), style in zip(theirs.items(), (PAPER, PAPER2)):
        data += curve([(r, [y]) for r, y in zip(paper["rank"], ys)], f"{name}, the paper", style, unit=f" ± {pm:g} %")
    ranks = sorted({*unique(easy, "rank")})
    panels = [Panel(
        title="easy: accuracy over r (%)", data=[*data, *curve(points, "sentiment", what="accuracy", unit=" %")],
        x=log_axis("rank r", ticks=ranks),
        y=axis("accuracy (%)", [*values(points), *([y] for ys, _ in theirs.values() for y in ys)], within=(0, 103)),
    )]  # fmt: skip
    if hard:
        losses = seeds_at(hard, "loss", "rank")
        panels.append(Panel(title="a new language: loss over r", data=curve(losses, "new language", SECOND),
                            x=log_axis("rank r", ticks=sorted(unique(hard, "rank"))),
                            y=axis("held-out loss (nats a token)", [*values(losses), *([r["loss"]] for r in full)]),
                            lines=[level(r["loss"], EDGE) for r in full],
                            labels=[note(max(r["loss"] for r in full), "full")] if full else ()))  # fmt: skip
    used = seeds_at(easy, "stable_rank", "rank")
    panels.append(Panel(
        title="directions that are used", x=log_axis("rank r", ticks=ranks), y=log_axis(
            "stable rank Σσ²/σ₁²", [*values(used), [1.0], [ranks[-1]]], ticks=[1, 2, 4, 8, 16, 32, 64]),
        data=[*curve([(r, [float(r)]) for r in (1, ranks[-1])], "all of r", CONTROL),
              *curve(used, "stable rank", FOURTH, log=True)]))  # fmt: skip
    table = [["task", "rank", "loss", "accuracy", "stable rank"],
             *([t, str(r) if r else "full", plus_minus(per_seed(rows, "loss", task=t, rank=r).values()),
                plus_minus([100 * v for v in per_seed(rows, "accuracy", task=t, rank=r).values()], " %")
                if t == "sentiment" else "",
                plus_minus(per_seed(rows, "stable_rank", task=t, rank=r).values()) if r else ""]
               for t in unique(rows, "task") for r in sorted(unique(by(rows, task=t), "rank")))]  # fmt: skip
    say = "A flat line means that more rank buys nothing; a line that climbs (or a loss that falls) that it does."
    return build("Quality over rank", say, panels, table)


def which(rows: Sequence[Row], paper: Paper) -> Figure:
    rows = [r for r in rows if r.get("best", True)]
    reference = "q,v"
    loss = {n: per_seed(rows, "loss", targets=n) for n in unique(rows, "targets")}
    names = {n: "all" if n.count(",") > 4 else n.replace(",", " ") for n in loss}
    order = sorted(loss, key=lambda n: interval(loss[n].values())[0])
    points = [(names[n], list(loss[n].values())) for n in order]
    accuracy = {n: per_seed(rows, "accuracy", targets=n) for n in loss}
    gaps = [(names[n], [100 * v for v in paired(accuracy[n], accuracy[reference])]) for n in order]
    theirs = scores(paper, len(paper["targets"]))
    data, groups = [], [*values(gaps)]
    for (name, (ys, pm)), style in zip(theirs.items(), (PAPER, PAPER2)):
        zero = ys[paper["targets"].index(reference)]
        found = [(names[t], [y - zero]) for t, y in zip(paper["targets"], ys) if t in names]
        data += dots(found, f"the paper, {name}", style, unit=" points",
                     ends=[(v[0] - pm, v[0] + pm) for _, v in found])  # fmt: skip
        groups.append([v[0] for _, v in found])
    left = Panel(title="held-out loss (nats)", data=dots(points, "here", unit=" nats"),
                 y=categories([n for n, _ in points]), x=axis("loss (nats)", values(points)),
                 lines=[mark(interval(loss[reference].values())[0])])  # fmt: skip
    right = Panel(title="accuracy against q v (points)", data=[*data, *dots(gaps, "here", unit=" points")],
                  y=categories([n for n, _ in points]), x=axis("points of accuracy", groups),
                  lines=[mark(0)])  # fmt: skip
    table = [["matrices", "ranks", "parameters", "loss", "accuracy"],
             *([names[n], " ".join(str(k) for k in one["ranks"].values()), f"{one['trainable']:,}",
                plus_minus(loss[n].values()), plus_minus([100 * v for v in accuracy[n].values()], " %")]
               for n in order for one in by(rows, targets=n)[:1])]  # fmt: skip
    say = (f"All have about the same number of parameters. Best first: {names[order[0]]}; last: {names[order[-1]]}."
           " The dashed line is q v.")  # fmt: skip
    return build("Where the parameters are put", say, [left, right], table, gap=0.16, aside=True)


def alpha(rows: Sequence[Row], paper: Paper) -> Figure:
    valleys, trace = by(rows, kind="valley"), by(rows, kind="invariance")
    ranks, scalings = sorted(unique(valleys, "rank")), unique(valleys, "scaling")
    points = {(s, r): seeds_at(valleys, "loss", "lr", scaling=s, rank=r) for s in scalings for r in ranks}
    groups = [v for p in points.values() for v in values(p)]
    styles = dict(zip(ranks, (SECOND, OURS, THIRD)))
    low, high = min(map(min, groups)), max(map(max, groups))
    y: dict[str, Any] = {"range": [low - 0.08 * (high - low), high + 0.1 * (high - low)]}
    panels = [Panel(title=f"scaled by {s}" if s != "fixed" else "a fixed scale", y=axis("held-out loss (nats)", **y),
                    data=[t for r, d in zip(ranks, (0.94, 1.0, 1.06)) for t in
                          curve(points[s, r], f"r = {r}", styles[r], what="loss", unit=" nats", dodge=d)],
                    x=log_axis("learning rate", ticks=(1e-3, 1e-2, 1e-1))) for s in scalings]  # fmt: skip
    if all("curve" in r for r in valleys):
        panels.append(_curves(valleys, scalings, ranks[-1]))
    steps = [r["step"] for r in trace]
    line = {"type": "scatter", "mode": "lines", "x": steps, "hovertemplate": "step %{x}: %{y:.3f} nats<extra></extra>"}
    off = max(abs(r["loss"] - r["loss_q"]) for r in trace)
    panels.append(Panel(title="α, and α/4 with 4 times B's rate", x=axis("step"), y=axis("training loss (nats)"), data=[
        {**line, "y": [r["loss"] for r in trace], "name": "α", "line": {"color": WARM_FILL, "width": 5}},
        {**line, "y": [r["loss_q"] for r in trace], "name": "α/4",
         "line": {"color": BASE, "width": 2, "dash": "dot"}}]))  # fmt: skip
    table = [["scaling", "rank", *(f"lr {number(lr)}" for lr in sorted(unique(valleys, "lr")))],
             *([s, str(r), *(plus_minus(v) for _, v in points[s, r])] for s in scalings for r in ranks)]  # fmt: skip
    say = ("Where the valleys of all ranks have their bottom at one rate, r can be changed without tuning it again. In"
           f" the last panel the two losses differ by at most {number(off)} nats.")  # fmt: skip
    return build("The best learning rate over rank, for three scalings", say, panels, table, columns=2, gap=0.14)


def _curves(valleys: Sequence[Row], scalings: Sequence[str], rank: int) -> Panel:
    """Training losses at one rank, each scaling at the rate whose loss is the lowest: means over seeds."""
    data = []
    for s, style in zip(scalings, (SECOND, OURS, THIRD)):
        mine = by(valleys, scaling=s, rank=rank)
        best = min(unique(mine, "lr"), key=lambda lr: interval([r["loss"] for r in by(mine, lr=lr)])[0])
        found = [r["curve"] for r in by(mine, lr=best)]
        y = [sum(v) / len(v) for v in zip(*found)]
        steps = [10 * (i + 0.5) for i in range(len(y))]  # a point is the mean of ten steps
        data.append({"type": "scatter", "mode": "lines", "x": steps, "y": y, "name": f"{s}, lr {number(best)}",
                     "line": {"color": style.color, "dash": style.dash, "width": 2.2},
                     "hovertemplate": f"{s}<br>step %{{x:.0f}}: %{{y:.3f}} nats<extra></extra>"})  # fmt: skip
    return Panel(title=f"r = {rank}, each at its best rate", x=axis("step"), y=axis("training loss (nats)"), data=data)


def objective(rows: Sequence[Row], paper: Paper) -> Figure:
    names = {"lm": "next word", "classify": "label", "preference": "preference"}
    goals = [g for g in names if by(rows, objective=g)]
    after = [(names[g], [r["after"] for r in by(rows, objective=g)]) for g in goals]
    before = [(names[g], [r["before"] for r in by(rows, objective=g)]) for g in goals]
    panel = Panel(data=[*curve(before, "before training", SECOND, unit=" nats", line=False),
                        *curve(after, "after", OURS, unit=" nats", line=False)],
                  x={"type": "category", "title": {"text": "what is learnt"}, "range": [-0.5, len(goals) - 0.5]},
                  y=axis("held-out loss (nats)", [*values(before), *values(after), [0.0]]))  # fmt: skip
    table = [["objective", "before (nats)", "after (nats)", "steps"],
             *([names[g], plus_minus(b), plus_minus(a), str(by(rows, objective=g)[0]["steps"])]
               for g, (_, b), (_, a) in zip(goals, before, after))]  # fmt: skip
    fell = sum(interval(a)[0] < interval(b)[0] for (_, a), (_, b) in zip(after, before))
    say = f"One spec: the loss falls under {fell} of {len(goals)}. Compare before with after, not their heights."
    return build("One spec under three objectives", say, [panel], table)
