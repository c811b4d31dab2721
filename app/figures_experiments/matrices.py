"""Inside the matrices: spectra, subspaces, cuts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from app.figures import EDGE, Figure
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
    heat,
    level,
    log_axis,
    no_ends,
    note,
    number,
    plus_minus,  # fmt: skip
    seeds_at,
    unique,
    values,
)
from lora_core.experiments.experiment import Row
from lora_core.experiments.verdicts import by, interval, per_seed


def w_rank(rows: Sequence[Row], paper: Paper) -> Figure:
    cut = {s: {r["block"]: r["loss"] for r in by(rows, kind="W", share=s)} for s in unique(by(rows, kind="W"), "share")}
    none, whole = cut[min(cut)], cut[max(cut)]
    keep = [(100 * s, [100 * (none[b] - v[b]) / (none[b] - whole[b]) for b in v]) for s, v in cut.items() if s > 0]
    delta = by(rows, kind="delta")
    gain = {s: {r["rank"]: r for r in by(delta, seed=s)} for s in unique(delta, "seed")}
    ks = [k for k in sorted(unique(delta, "rank")) if k]
    mine = [(100 * next(iter(gain.values()))[k]["share"],
             [100 * (g[0]["loss"] - g[k]["loss"]) / (g[0]["loss"] - g[ks[-1]]["loss"]) for g in gain.values()])
            for k in ks]  # fmt: skip
    left = Panel(
        title="what is kept of the gain (%)",
        data=[*curve(keep, "W cut", SECOND, unit=" % kept"), *curve(mine, "trained ΔW cut", OURS, unit=" % kept")],
        x=log_axis("directions kept (% of all)", ticks=(0.1, 0.3, 1, 3, 10, 30, 100)),
        y=axis("gain kept (%)", range=[-25, 112]), lines=[level(95)],
        labels=[note(95, "95 %", x=0, shift=-10)])  # fmt: skip
    spectra = by(rows, kind="spectrum")
    targets = unique(spectra, "target")
    ninety = [(t, [100 * r["energy_90"] / r["full"] for r in by(spectra, target=t)]) for t in targets]
    chance = [(t, [100 * by(spectra, target=t)[0]["gaussian_90"] / by(spectra, target=t)[0]["full"]]) for t in targets]
    layers = [{**t, "showlegend": False} for t in dots(ninety, "W, each layer", SECOND, unit=" %",
                                                          ends=no_ends(ninety))]  # fmt: skip
    right = Panel(title="90 % of Σσ² lie in … of the directions",
                  data=[*layers, *dots(chance, "Gaussian matrix", CONTROL, unit=" %")],
                  x=axis("directions (%)", range=[0, 103]), y=categories(targets))  # fmt: skip
    table = [["W cut to", "loss (nats a token)", "gain kept"],
             *([f"{100 * s:.3g} %", plus_minus(v.values()), plus_minus(dict(keep).get(100 * s, [0]), " %")]
               for s, v in cut.items())]  # fmt: skip
    half = dict(keep).get(50.0, keep[-1][1])
    least = next((k for k, (_, v) in zip(ks, mine) if interval(v)[0] >= 95), ks[-1])
    say = (f"W cut to half of its directions keeps {plus_minus(half, ' %')} of what it gains; a ΔW trained at rank"
           f" {ks[-1]} keeps 95 % with {least} of them. A negative value: worse than no matrix at all.")  # fmt: skip
    return build("How much of W is needed, and how much of ΔW", say, [left, right], table, gap=0.15)


def subspace(rows: Sequence[Row], paper: Paper) -> Figure:
    at = (1, 2, 4, 8, 16, 32, 64)
    heats = (("A", "ranks"), ("A", "seeds"), ("Gaussian", "ranks"))
    panels = []
    for i, (of, pair) in enumerate(heats):
        mine = by(rows, of=of, pair=pair)
        n1, n2 = mine[0]["ranks"]
        grids = [r["phi"] for r in mine]
        mean = [[sum(g[a][b] for g in grids) / len(grids) for b in range(len(grids[0][0]))]
                for a in range(len(grids[0]))]  # fmt: skip
        what = {"A": f"A of r = {n1} in r = {n2}" if pair == "ranks" else f"two seeds of r = {n1}"}
        panels.append(Panel(title=f"φ, {what.get(of, 'Gaussian noise')}",
                            data=[heat(at[: len(mean[0])], at[: len(mean)], mean, "φ", scale=i == 0)],
                            x={"title": {"text": "first j directions"}, "type": "category", "showgrid": False},
                            y={"title": {"text": "first i"}, "type": "category", "showgrid": False}))  # fmt: skip
    data = []
    for of, target, style in (("A", "q", SECOND), ("A", "v", OURS), ("Gaussian", None, CONTROL)):
        mine = by(rows, of=of, pair="ranks", **({"target": target} if target else {}))
        data += curve(seeds_at(mine, "top", "layer"), target or of, style, what="φ(1, 1)")
    panels.append(Panel(title="the top direction, by layer", data=data, x=axis("layer", dtick=1),
                        y=axis("φ(1, 1)", range=[-0.06, 1.06]), lines=[level(0.5)],
                        labels=[note(0.5, "the paper: above 0.5")]))  # fmt: skip
    table = [["of", "pair", "matrix", "φ(1, 1)", "all small in large"],
             *([of, pair, t, plus_minus(per_seed(rows, "top", of=of, pair=pair, target=t).values()),
                plus_minus(per_seed(rows, "small", of=of, pair=pair, target=t).values())]
               for of in unique(rows, "of") for pair in unique(by(rows, of=of), "pair")
               for t in unique(rows, "target"))]  # fmt: skip
    shared, chance = (plus_minus(per_seed(rows, "top", of=of, pair="ranks").values()) for of in ("A", "Gaussian"))
    say = ("Bright: the first i directions of one lie in the first j of the other. The top direction is shared between"
           f" the ranks to {shared}, between noise to {chance}.")  # fmt: skip
    return build("Which directions are shared (mean over layers, matrices, seeds)", say, panels, table, columns=2,
                 gap=0.2)  # fmt: skip


def amplify(rows: Sequence[Row], paper: Paper) -> Figure:
    ranks = sorted(unique(rows, "rank"))
    names = (("of_W", "of W", "W's own"), ("of_delta", "of ΔW", "ΔW's"), ("random_formula", "random", "random"))
    data, groups = [], []
    for (r, style), i in zip(zip(ranks, (OURS, FOURTH)), range(2)):
        share = [{**x, **{c: x[c] / x["norm_W"] for c, _, _ in names}} for x in by(rows, rank=r)]
        points = [(word, list(per_seed(share, c).values())) for c, _, word in names]
        theirs = [(word, [paper[p][i] / paper["‖W‖"]]) for _, p, word in names]
        groups += values(points) + values(theirs)
        data += curve(theirs, f"the paper, r = {paper['rank'][i]}", (PAPER, PAPER2)[i], line=False)
        data += curve(points, f"here, r = {r}", style, line=False, log=True)
    left = Panel(title="‖UᵀWVᵀ‖ / ‖W‖ in these directions", data=data, x={"type": "category", "range": [-0.5, 2.5]},
                 y=log_axis("share of ‖W‖", groups, ticks=[1e-4, 1e-3, 1e-2, 0.1, 1]))  # fmt: skip
    curves, high = [], []
    for r, style in zip(ranks, (OURS, FOURTH)):
        points = seeds_at(rows, "amplification", "layer", rank=r)
        curves += curve(points, f"here, r = {r}", style, what="×", log=True)
        high += values(points)
    right = Panel(title="amplification by layer", data=curves, x=axis("layer", dtick=1),
                  y=log_axis("‖ΔW‖ / ‖UᵀWVᵀ‖", [*high, paper["amplification"]], ticks=(0.3, 1, 2, 5, 10, 20, 50)),
                  lines=[level(v, EDGE) for v in paper["amplification"]],
                  labels=[note(math.log10(v), f"the paper, r = {r}: {number(v)}", shift=10)
                          for r, v in zip(paper["rank"], paper["amplification"])])  # fmt: skip
    table = [["rank", "‖UᵀWVᵀ‖ of ΔW", "of W", "random", "‖ΔW‖", "amplification"],
             *([str(r), *(plus_minus(per_seed(rows, c, rank=r).values()) for c in (
                 "of_delta", "of_W", "random_formula", "norm_delta", "amplification"))] for r in ranks),
             *([f"{r} (paper)", *(number(paper[c][i]) for c in ("of ΔW", "of W", "random", "‖ΔW‖", "amplification"))]
               for i, r in enumerate(paper["rank"]))]  # fmt: skip
    low = by(rows, rank=ranks[0])
    random, own, times = (plus_minus(per_seed(low, c).values()) for c in ("over_random", "over_W", "amplification"))
    say = (f"At r = {ranks[0]} the directions of ΔW hold {random} times as much of W as random ones and {own} times as"
           f" much as W's own; ΔW is {times} times as large there.")  # fmt: skip
    return build("W seen in the directions of ΔW", say, [left, right], table, gap=0.15)


def truncate(rows: Sequence[Row], paper: Paper) -> Figure:
    series = (("cut", "r = 64, cut to k", OURS), ("trained", "trained at k", SECOND),
              ("full cut", "full ΔW, cut to k", THIRD), ("cut, weighted", "the same, weighted by inputs", FOURTH),
              ("full cut, weighted", "full, weighted", CONTROL))  # fmt: skip
    data, groups, base = [], [], per_seed(rows, "loss", kind="cut", k=0)
    top = max(r["k"] for r in by(rows, kind="cut"))
    series = [x for x in series if by(rows, kind=x[0])]
    for (kind, name, style), aside in zip(series, (0.94, 1.0, 1.06, 0.97, 1.03)):
        points = [(k, v) for k, v in seeds_at(rows, "loss", "k", kind=kind) if k > 0]
        groups += values(points)
        data += curve(points, name.replace("64", str(top)), style, unit=" nats", dodge=aside)
    whole = interval(per_seed(rows, "loss", kind="full cut", k=-1).values())[0]
    zero = interval(base.values())[0]
    ks = sorted({r["k"] for r in rows if r.get("k", 0) > 0})
    left = Panel(title="held-out loss over k (nats)", data=data, x=log_axis("directions kept, k", ticks=ks),
                 y=axis("loss (nats)", [*groups, [zero], [whole]]), lines=[level(zero), level(whole, EDGE)],
                 labels=[note(zero, "ΔW = 0"), note(whole, "full, uncut", shift=-10)])  # fmt: skip
    spectra = by(rows, kind="spectrum")
    targets = unique(spectra, "target")

    def share(column: str) -> list[tuple[str, list[float]]]:
        return [(t, [100 * r[column] / r["full"] for r in by(spectra, target=t)]) for t in targets]

    right = Panel(title="90 % of Σσ² of the full ΔW lie in …", y=categories(targets),
                  x=axis("directions (%)", range=[0, 103]),
                  data=[*dots(full := share("energy_90"), "full ΔW", THIRD, unit=" %",
                              ends=no_ends(full)),
                        *dots(share("gaussian_90"), "Gaussian noise", CONTROL, unit=" %")])  # fmt: skip
    table = [["k", *(name.replace("64", str(top)) for _, name, _ in series)],
             *([str(k), *(plus_minus(per_seed(rows, "loss", kind=kind, k=k).values()) for kind, _, _ in series)]
               for k in ks)]  # fmt: skip
    say = "Where the cut lines lie on the bottom already at a small k, a few directions did all the work."
    return build("How much of ΔW can be cut away", say, [left, right], table, gap=0.16)
