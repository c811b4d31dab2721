"""choose: is there a principled way to pick the matrices? Rules that look before training, against what came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_core.experiments.experiment import Experiment, Row
from lora_core.experiments.lab import Cell
from lora_core.experiments.training import sites_of, trained
from lora_core.experiments.verdicts import above, by, every, interval, learnt, paired, per_seed, pm, unlearnt, verdict
from lora_core.spec import LoraSpec

if TYPE_CHECKING:
    import torch

    from lora_core.experiments.lab import Lab
    from lora_core.sites import Site

KINDS = ("q", "k", "v", "o", "gate", "up", "down")
RULES = {"gradient": +1, "NFN": -1, "κ": -1, "EVA": +1}  # whether to adapt where the score is high or low
NAMES = {"gradient": "the gradient's norm", "NFN": "PLoP's NFN", "κ": "the condition number",
         "EVA": "EVA's explained variance"}  # fmt: skip
RANK, ALPHA = 20, 16.0  # of the smallest group; the others get as many parameters
SAMPLE, TOP = 64, 8  # rows that the rules look at; directions of the inputs whose variance EVA counts
HABIT = ("q", "v")  # what is adapted where nobody chooses
SLACK = 0.02  # nats


def run(lab: Lab) -> list[Row]:
    """The scores of every group of matrices, then each group trained alone at an equal budget, with each seed."""
    parts = lab.choose(1, 2)
    rates = lab.choose((5e-3,), (5e-3, 1e-2))
    cells = [Cell("scores", lambda: _scores(lab, parts), 2)]
    cells += [Cell(f"seed {s}, rate {lr:g}", lambda s=s, lr=lr: _train(lab, s, lr, parts), 10) for s in lab.seeds
              for lr in rates]  # fmt: skip
    found = lab.run(cells)
    rows = [row for c in cells[1:] for row in found[c.key]]
    mean = {(g, lr): interval([r["loss"] for r in by(rows, group=g, lr=lr)])[0] for g, lr in
            {(r["group"], r["lr"]) for r in rows}}  # fmt: skip
    best = {g: min((lr for h, lr in mean if h == g), key=lambda lr: mean[g, lr]) for g, _ in mean}
    return found["scores"] + [{**r, "best": r["lr"] == best[r["group"]]} for r in rows]


def groups(model: Any, parts: int) -> dict[str, list[Site]]:
    """{name: sites} of every kind of matrix in so many stretches of the layers: "q", or "q low" and "q high"."""
    sites = sites_of(model, KINDS)
    layers = 1 + max(s.layer or 0 for s in sites)
    parts = min(parts, layers)
    ends = ("",) if parts == 1 else (" low", " high") if parts == 2 else tuple(f" {i + 1}" for i in range(parts))
    found: dict[str, list[Site]] = {}
    for i in range(parts):
        for s in sites:
            if (s.layer or 0) * parts // layers == i:
                found.setdefault(s.target + ends[i], []).append(s)
    return found


def equal_specs(sites: Mapping[str, Sequence[Site]]) -> dict[str, LoraSpec]:
    """{group: spec} with as many parameters as the smallest group has at rank 20, as nearly as whole ranks allow."""
    cost = {g: sum(s.out + s.in_ for s in mine) for g, mine in sites.items()}
    most = {g: min(min(s.out, s.in_) for s in mine) for g, mine in sites.items()}
    small = min(cost, key=lambda g: cost[g])
    budget = min(RANK, most[small]) * cost[small]
    return {g: LoraSpec(targets=(mine[0].target,), layers=tuple(dict.fromkeys(s.layer or 0 for s in mine)), alpha=ALPHA,
                        rank=max(1, min(budget // cost[g], most[g]))) for g, mine in sites.items()}  # fmt: skip


# ---- the rules -----------------------------------------------------------------------------------------------------
def nfn(W: torch.Tensor, X: torch.Tensor, noise: torch.Tensor) -> float:
    """‖Wz‖ over ‖W z̃‖, z̃ Gaussian of z's size: the mean over the inputs X (n, in); low where W is not made for them.

    PLoP (arXiv 2506.20629) adapts where it is lowest. noise (n, in): standard normal.
    """
    noise = noise * (X.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True))
    return float(((X @ W.T).norm(dim=1) / (noise @ W.T).norm(dim=1)).mean())


def condition(W: torch.Tensor) -> float:
    """σ₁/σₙ, of which KappaTune takes the lowest."""
    import torch

    S = torch.linalg.svdvals(W)
    return float(S[0] / S[-1])


def explained(X: torch.Tensor, k: int = TOP) -> float:
    """The share of Σσ² of the inputs X (n, in) that their k first directions have: EVA (arXiv 2410.07170) gives rank
    where it is high. Matrices with the same inputs cannot be told apart by it."""
    import torch

    s = torch.linalg.svdvals(X) ** 2
    return float(s[:k].sum() / s.sum())


def _scores(lab: Lab, parts: int) -> list[Row]:
    """Every rule's score of every group: the mean over its matrices, from rows that are trained on."""
    import torch

    import lora_core as lc
    from lora_core.experiments.inputs import gradients, inputs
    from lora_core.experiments.training import warm_head

    model, tokenizer = lab.encoder()
    goal = lc.Classification(model, tokenizer)
    train = lc.load_task("sentiment", seed=0, train=600, test=1).train
    sites = groups(model, parts)
    every_site = [s for mine in sites.values() for s in mine]
    with warm_head(lab, goal, train):
        X = inputs(goal, every_site, train[:SAMPLE])
        G = gradients(goal, every_site, train[:SAMPLE])
    generator = torch.Generator().manual_seed(0)
    noise = {p: torch.randn(x.shape, generator=generator, dtype=x.dtype) for p, x in X.items()}
    share = {p: explained(x) for p, x in X.items()}
    each: dict[str, dict[str, float]] = {}
    for i, s in enumerate(every_site):
        lab.at(i / len(every_site))
        W = s.weight(model.get_submodule(s.path)).detach().double()
        each[s.key] = {"gradient": float(G[s.key].norm()), "NFN": nfn(W, X[s.path], noise[s.path]), "κ": condition(W),
                       "EVA": share[s.path]}  # fmt: skip
    return [{"kind": "score", "group": g, "rule": rule, "score": float(np.mean([each[s.key][rule] for s in mine]))}
            for g, mine in sites.items() for rule in RULES]  # fmt: skip


def _train(lab: Lab, seed: int, lr: float, parts: int) -> list[Row]:
    specs = equal_specs(groups(lab.encoder()[0], parts))
    names = {g: g.replace(" ", "-") for g in specs}
    with trained(lab, {names[g]: s for g, s in specs.items()}, seed=seed, steps=lab.steps(50, 50), lr=lr) as t:
        return [{"kind": "loss", "group": g, "rank": s.rank, "seed": seed, "lr": lr,
                 "base_loss": t.figures[None]["loss"], **t.figures[names[g]]} for g, s in specs.items()]  # fmt: skip


# ---- judging -------------------------------------------------------------------------------------------------------
def ranks(values: Sequence[float]) -> np.ndarray:
    """1 for the smallest; equal values share the mean of their places."""
    v = np.asarray(values, float)
    return (v[:, None] > v[None, :]).sum(1) + ((v[:, None] == v[None, :]).sum(1) + 1) / 2


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """The correlation of their ranks; 0 where one of them is all the same."""
    x, y = ranks(a) - (len(a) + 1) / 2, ranks(b) - (len(b) + 1) / 2
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size else 0.0


def judge(rows: Sequence[Row]) -> tuple[str, str]:
    """A rule's order goes with the measured one, and its first third beats its last; and is not behind q and v."""
    losses = by(rows, kind="loss", best=True)
    seeds = sorted({r["seed"] for r in losses})
    gains = [max(r["base_loss"] - r["loss"] for r in by(losses, seed=s)) for s in seeds]
    if not learnt(gains):
        return unlearnt(gains)
    loss = {g: per_seed(losses, "loss", group=g) for g in dict.fromkeys(r["group"] for r in losses)}
    third = max(1, len(loss) // 3)
    rho, first, gap = {}, {}, {}
    for rule, sign in RULES.items():
        score = {r["group"]: -sign * r["score"] for r in by(rows, rule=rule)}  # the lowest comes first
        order = sorted(loss, key=lambda g: score[g])
        rho[rule] = [spearman([score[g] for g in loss], [loss[g][s] for g in loss]) for s in seeds]
        ends = [{s: float(np.mean([loss[g][s] for g in part])) for s in seeds} for part in
                (order[:third], order[-third:])]  # fmt: skip
        first[rule], gap[rule] = ends[0], paired(ends[1], ends[0])
    best = max(RULES, key=lambda r: interval(rho[r])[0])
    habit = {s: float(np.mean([v[s] for g, v in loss.items() if g.split()[0] in HABIT])) for s in seeds}
    tells = every([above(rho[best]), above(gap[best])])
    as_good = above(paired(habit, first[best]), -SLACK)
    order = sorted(loss, key=lambda g: interval(loss[g].values())[0])
    told = "; ".join(f"{NAMES[r]} {pm(rho[r], 2)}" for r in sorted(RULES, key=lambda r: -interval(rho[r])[0]))
    use = (f"Of these {NAMES[best]} is the one to use" if verdict([tells, as_good]) == "holds"
           else f"None can be recommended by this; {NAMES[best]} does best")  # fmt: skip
    return verdict([tells, as_good]), (
        f"Rank correlation of each rule with the measured loss, over {len(loss)} groups of matrices: {told}. {use}: its"
        f" first {third} of them end {pm(gap[best])} nats below its last, and {pm(paired(habit, first[best]))} below"
        f" the mean of q and v. Measured, {order[0]} is the best group ({pm(loss[order[0]].values())}) and {order[-1]}"
        f" the worst ({pm(loss[order[-1]].values())})."
    )


EXPERIMENT = Experiment(
    name="choose",
    question="Are there more principled ways than habit to choose the matrices to adapt?",
    section="8",
    claim="Left open: the choice of matrices rests mostly on heuristics, and there may be more principled ways. Here:"
          " whether a rule that looks before training orders the matrices as training does, and is as good as q and v.",
    choices=("Yes: one look at gradients or inputs tells which matrices will learn best.",
             "The rules say something, but no more than the habit of q and v.",
             "No: what the rules say has nothing to do with what is measured."),
    answer=0,
    paper={"numbers": "none; an open question of section 8", "later": ["PLoP (2506.20629): lowest NFN",
           "KappaTune: lowest condition number", "EVA (2410.07170): inputs' explained variance",
           "LoRA-GA (2407.05000): the first gradient"]},
    run=run,
    judge=judge,
)  # fmt: skip
