"""LoRA beside others: the compared methods, full fine-tuning, rules that choose matrices, what is forgotten."""

from __future__ import annotations

from collections.abc import Sequence

from app.figures import EDGE, Figure
from app.figures_experiments.panels import (
    CONTROL,
    FOURTH,
    OURS,
    PAPER,
    SECOND,
    STYLES,
    THIRD,
    Panel,
    Paper,
    Style,
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
    unique,
    values,
)
from lora_core.experiments.experiment import Row
from lora_core.experiments.verdicts import by, interval, paired, per_seed

MIXED = Style(OURS.color, "circle-open", "dash")  # LoRA and something else


def methods(rows: Sequence[Row], paper: Paper) -> Figure:
    from lora_core.experiments.methods import front
    from lora_core.methods import METHODS

    names = {m: METHODS[m].title for m in unique(rows, "method")}
    styles = dict(zip(names, (SECOND, THIRD, FOURTH, *STYLES[4:], CONTROL, OURS, MIXED)))
    styles["lora"] = OURS
    data, groups, counts = [], [], []
    for m, name in names.items():
        mine = by(rows, method=m)
        points = [(n, list(per_seed(mine, "loss", trainable=n).values())) for n in sorted(unique(mine, "trainable"))]
        groups += values(points)
        counts += [[n] for n, _ in points]
        data += curve(points, name, styles[m], what="parameters:", unit=" nats")
    best = front(rows)
    edge = {"type": "scatter", "mode": "lines", "x": [n for _, n, _ in best], "y": [y for _, _, y in best],
            "name": "least loss for so few", "line": {"shape": "hv", "color": EDGE, "width": 6}, "opacity": 0.35,
            "hoverinfo": "skip"}  # fmt: skip
    left = Panel(title="held-out loss over trained parameters", data=[edge, *data], y=axis("loss (nats)", groups),
                 x=log_axis("trained parameters", counts))  # fmt: skip
    accuracy = [(names[m], [100 * v for v in per_seed(rows, "accuracy", method=m, trainable=n).values()])
                for m in names for n in [_middle(by(rows, method=m))]]  # fmt: skip
    order = [n for n, _ in sorted(accuracy, key=lambda p: -interval(p[1])[0])]
    theirs = [(names[m], [bleu - paper["BLEU"][paper["method"].index("lora")]]) for m, bleu in
              zip(paper["method"], paper["BLEU"]) if m in names]  # fmt: skip
    lora = next(v for n, v in accuracy if n == names["lora"])
    gaps = [(n, [a - b for a, b in zip(v, lora)]) for n, v in accuracy]
    right = Panel(title="against LoRA (points)", y=categories(order), lines=[mark(0)],
                  x=axis("accuracy or BLEU (points)", [*values(gaps), *values(theirs)]),
                  data=[*dots(theirs, "the paper, BLEU", PAPER, unit=" points"),
                        *dots(gaps, "accuracy, here", OURS, unit=" points")])  # fmt: skip
    table = [["method", "parameters", "loss", "accuracy", "learning rate"],
             *([names[m], f"{n:,}", plus_minus(per_seed(mine, "loss").values()),
                plus_minus([100 * v for v in per_seed(mine, "accuracy").values()], " %"), number(mine[0]["lr"])]
               for m in names for n in sorted(unique(by(rows, method=m), "trainable"))
               for mine in [by(rows, method=m, trainable=n)])]  # fmt: skip
    first = ", ".join(dict.fromkeys(names[m] for m, _, _ in best))
    say = f"On the grey line, no other has as few parameters and less loss: {first}."
    return build("The compared methods", say, [left, right], table, gap=0.25)


def _middle(rows: Sequence[Row]) -> int:
    """The parameters of a method where all are compared: at the budget that the experiment calls equal."""
    from lora_core.experiments.methods import EQUAL

    return (by(rows, budget=EQUAL) or list(rows))[0]["trainable"]


def generalises(rows: Sequence[Row], paper: Paper) -> Figure:
    full = per_seed(rows, "loss", kind="full")
    kinds = (("lora", "LoRA on all matrices, over r", OURS), ("bottleneck", "adapter layers, over units", SECOND),
             ("prefix", "prefix, over tokens", THIRD))  # fmt: skip
    panels = []
    for column, title in (("loss", "held-out loss"), ("train_loss", "training loss at the end")):
        data, groups, at = [], [list(per_seed(rows, column, kind="full").values())], []
        for kind, name, style in kinds:
            mine = by(rows, kind=kind)
            points = [(s, list(per_seed(mine, column, size=s).values())) for s in sorted(unique(mine, "size"))]
            groups += values(points)
            at += [s for s, _ in points if kind == "lora"]
            data += curve(points, name, style, unit=" nats")
        zero = interval(groups[0])[0]
        panels.append(Panel(title=f"{title} (nats)", data=data, x=log_axis("size: r, units or tokens", ticks=at),
                            y=axis("loss (nats)", groups), lines=[level(zero)],
                            labels=[note(zero, "full fine-tuning", shift=-10)]))  # fmt: skip
    table = [["what", "size", "parameters", "loss", "above full", "training loss"],
             *([kind, "" if s is None else str(s), f"{mine[0]['trainable']:,}",
                plus_minus(per_seed(mine, "loss").values()),
                plus_minus(paired(per_seed(mine, "loss"), full)), plus_minus(per_seed(mine, "train_loss").values())]
               for kind in unique(rows, "kind") for s in unique(by(rows, kind=kind), "size")
               for mine in [by(rows, kind=kind, size=s)])]  # fmt: skip
    say = "Where the line of LoRA comes down to the dashed one, it has become full fine-tuning."
    return build("Loss over size, up to full rank", say, panels, table, gap=0.16)


def choose(rows: Sequence[Row], paper: Paper) -> Figure:
    from lora_core.experiments.choose import RULES, spearman

    runs = [r for r in by(rows, kind="loss") if r.get("best", True)]
    loss = {g: per_seed(runs, "loss", group=g) for g in unique(runs, "group")}
    order = sorted(loss, key=lambda g: interval(loss[g].values())[0])
    score = {rule: {r["group"]: r["score"] for r in by(rows, kind="score", rule=rule)} for rule in RULES}
    seeds = unique(runs, "seed")
    rho = {rule: [spearman([-sign * score[rule][g] for g in order], [loss[g][n] for g in order]) for n in seeds]
           for rule, sign in RULES.items()}  # fmt: skip
    points = [(g, list(loss[g].values())) for g in order]
    left = Panel(title="loss of each group alone (nats)", data=dots(points, "here", OURS, unit=" nats"),
                 y=categories(order), x=axis("loss (nats)", values(points)))  # fmt: skip
    told = [(rule, rho[rule]) for rule in sorted(RULES, key=lambda r: -interval(rho[r])[0])]
    right = Panel(title="does the rule order them so?", y=categories([n for n, _ in told]), lines=[mark(0)],
                  data=dots(told, "rules", SECOND), x=axis("rank correlation", range=[-1.05, 1.05]))  # fmt: skip
    table = [["group", "rank", "loss", *RULES],
             *([g, str(by(runs, group=g)[0]["rank"]), plus_minus(loss[g].values()),
                *(number(score[r][g]) for r in RULES)] for g in order)]  # fmt: skip
    say = (f"Best alone: {order[0]}; worst: {order[-1]}. A rule on the dashed line says nothing about that order;"
           " at 1 it would be right throughout.")  # fmt: skip
    return build("Groups of matrices, and the rules that would choose them", say, [left, right], table, gap=0.18)


def forget(rows: Sequence[Row], paper: Paper) -> Figure:
    runs, new = by(rows, kind="loss"), by(rows, kind="intruders")
    ways = unique(runs, "method")
    change = [{**r, "task": r["task_after"] - r["task_before"], "other": r["other_after"] - r["other_before"]}
              for r in runs]  # fmt: skip
    task, other = ([(m, list(per_seed(change, c, method=m).values())) for m in ways] for c in ("task", "other"))
    left = Panel(title="change of the loss (nats a token)", lines=[level(0)],
                 data=[*curve(task, "the task", OURS, line=False), *curve(other, "other text", SECOND, line=False)],
                 x={"type": "category", "range": [-0.6, len(ways) - 0.4]},
                 y=axis("after − before (nats)", [*values(task), *values(other), [0.0]]))  # fmt: skip
    found, chance = ([(m, list(per_seed(new, c, method=m).values())) for m in ways] for c in ("intruders", "random"))
    right = Panel(title="new among the first ten", x={"type": "category", "range": [-0.6, len(ways) - 0.4]},
                  data=[*curve(found, "tuned", THIRD, line=False),
                        *curve(chance, "random update", CONTROL, line=False)],
                  y=axis("directions a matrix", [*values(found), *values(chance), [0.0]]))  # fmt: skip
    table = [["", "task", "other text", "new directions", "their share of Σσ²", "random update"],
             *([m, plus_minus(t), plus_minus(o), *(plus_minus(per_seed(new, c, method=m).values())
                                                   for c in ("intruders", "energy", "random"))]
               for (m, t), (_, o) in zip(task, other))]  # fmt: skip
    per = [f"{m} {number(interval(o)[0] / -interval(t)[0])}" for (m, t), (_, o) in zip(task, other)]
    say = f"Below 0 it got better, above 0 worse. Nats lost on other text for each nat gained: {', '.join(per)}."
    return build("What is gained, and what it costs", say, [left, right], table, gap=0.16)
