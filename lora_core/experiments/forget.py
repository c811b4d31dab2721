"""forget: what does adapting cost? Loss on other text before and after, and directions that W did not have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_core.experiments.experiment import Experiment, Row
from lora_core.experiments.lab import Cell
from lora_core.experiments.training import Trained, sites_of, trained
from lora_core.experiments.verdicts import above, by, every, interval, learnt, paired, per_seed, pm, unlearnt, verdict
from lora_core.spec import LoraSpec

if TYPE_CHECKING:
    import torch

    from lora_core.experiments.lab import Lab
    from lora_core.tasks import Row as TaskRow

TARGETS, RANK, ALPHA = ("q", "v", "up", "down"), 8, 16.0
RATES = {"LoRA": 2e-3, "full": 3e-4}
WHY = (" Likely because LoRA's rate is the higher: to learn as fast, its few directions take larger steps, while a"
       " later paper compares long runs.")  # fmt: skip
TOP, EPSILON = 10, 0.5  # intruders are sought among the first ten directions; below this cosine one is new


def run(lab: Lab) -> list[Row]:
    """A language that nobody speaks, learnt by LoRA and by full fine-tuning of the same matrices, with each seed."""
    cells = [Cell(f"{m} {s}", lambda m=m, s=s: _train(lab, m, s), w) for s in lab.seeds
             for m, w in (("LoRA", 1), ("full", 2))]  # fmt: skip
    return [row for rows in lab.run(cells).values() for row in rows]


def other_text(count: int) -> list[TaskRow]:
    """Plain English that has nothing to do with the task: reviews, as text without a prompt."""
    import lora_core as lc

    rows = lc.load_task("sentiment", seed=1, train=1, test=count).test
    return [lc.Row("", r.prompt, i) for i, r in enumerate(rows, 1)]


def intruders(U0: torch.Tensor, U: torch.Tensor, S: torch.Tensor) -> tuple[int, float]:
    """(how many of the first ten left-singular vectors of W0 + ΔW are like none of W0's, their share of Σσ²).

    U0 (out, n) of W0; U (out, n) and S (n,) of the tuned matrix. Like: |cos| of at least 0.5 with any of them (arXiv
    2410.21228). A random direction counts as well, so that a new one is only one that is spread over many of W0's.
    """
    like = (U0.T @ U[:, :TOP]).abs().amax(0)
    new = like < EPSILON
    return int(new.sum()), float((S[:TOP][new] ** 2).sum() / (S**2).sum())


def _text_loss(t: Trained, name: str | None, rows: Sequence[TaskRow]) -> float:
    """Nats a token of plain text, without its end: after a hundred short rows any model expects texts to end soon."""
    from lora_core.evaluate import mean_loss, only

    goal: Any = t.objective
    items = [replace(e, ids=e.ids[:-1]) for e in goal.encode(rows)]
    with only(t.model, name):
        return mean_loss(goal, items) or 0.0


def _train(lab: Lab, method: str, seed: int) -> list[Row]:
    import torch


    model, _ = lab.writer()
    sites = sites_of(model, TARGETS)
    spec = (LoraSpec(targets=TARGETS, rank=RANK, alpha=ALPHA) if method == "LoRA" else
            LoraSpec(targets=("norm",), full=tuple(dict.fromkeys(s.path for s in sites))))  # fmt: skip
    layers = 1 + max(s.layer or 0 for s in sites)
    some = [s for s in sites if (s.layer or 0) in {layers // 6, layers // 2, 5 * layers // 6}]  # an SVD takes its time
    other = other_text(lab.choose(24, 48))
    with trained(lab, {"one": spec}, seed=seed, steps=lab.steps(12, 40), lr=RATES[method], task="new-language",
                 batch=4, rows=1000, longest=22, held=24, share=0.8) as t:  # fmt: skip
        text = {name: _text_loss(t, name, other) for name in (None, "one")}
        rows: list[Row] = [{"kind": "loss", "method": method, "seed": seed, "task_before": t.figures[None]["loss"],
                            "task_after": t.figures["one"]["loss"], "other_before": text[None],
                            "other_after": text["one"]}]  # fmt: skip
        a, draw = t.adapters["one"], torch.Generator().manual_seed(seed)
        for s in some:
            W = s.weight(model.get_submodule(s.path)).detach().float()
            U0 = lab.keep(f"left {s.key}", lambda W=W: torch.linalg.svd(W, full_matrices=False)[0])
            D = (a.delta(s.key).dense() if method == "LoRA" else s.of(a.copies[f"{s.path}.{s.param}"]) - W).detach()
            D = D.float()
            noise = _noise(D, RANK if method == "LoRA" else None, draw)
            found = [intruders(U0, *torch.linalg.svd(W + x, full_matrices=False)[:2]) for x in (D, noise)]
            rows.append({"kind": "intruders", "method": method, "seed": seed, "target": s.target, "layer": s.layer,
                         "size": float(D.norm() / W.norm()), "intruders": found[0][0], "energy": found[0][1],
                         "random": found[1][0], "random_energy": found[1][1]})  # fmt: skip
    return rows


def _noise(D: torch.Tensor, rank: int | None, draw: torch.Generator) -> torch.Tensor:
    """A random update of D's size (Frobenius norm), of that rank or of full rank."""
    import torch

    out, in_ = D.shape
    x = (torch.randn(out, in_, generator=draw) if rank is None
         else torch.randn(out, rank, generator=draw) @ torch.randn(rank, in_, generator=draw))  # fmt: skip
    return x * (D.norm() / x.norm())


def judge(rows: Sequence[Row]) -> tuple[str, str]:
    """LoRA learns less than full fine-tuning, and what it does to other text is less."""
    mine = {m: by(rows, kind="loss", method=m) for m in RATES}
    gain = {m: {r["seed"]: r["task_before"] - r["task_after"] for r in mine[m]} for m in RATES}
    rise = {m: {r["seed"]: r["other_after"] - r["other_before"] for r in mine[m]} for m in RATES}
    if not every([learnt(gain[m].values()) for m in RATES]):
        return unlearnt(gain["LoRA"].values())
    less = above(paired(gain["full"], gain["LoRA"]))
    keeps = above(paired(rise["full"], rise["LoRA"]))
    per = {m: [rise[m][s] / gain[m][s] for s in rise[m]] for m in RATES}
    before = interval([r["other_before"] for m in RATES for r in mine[m]])[0]
    count = {m: {c: interval(per_seed(rows, c, kind="intruders", method=m).values())[0]
                 for c in ("intruders", "random", "energy")} for m in RATES}  # fmt: skip
    size = {m: interval(per_seed(rows, "size", kind="intruders", method=m).values())[0] for m in RATES}
    new = "; ".join(f"{m} {c['intruders']:.1f} ({c['energy']:.1%} of Σσ²; random updates of that size"
                    f" {c['random']:.1f})" for m, c in count.items())  # fmt: skip
    new = (f"Of the first ten directions of a tuned matrix so many are new: {new}" if any(
        c[k] for c in count.values() for k in ("intruders", "random")) else
        "None of the first ten directions of a tuned matrix is new, by either, nor by random updates of that size")
    return verdict([less, keeps]), (
        f"LoRA gains {pm(gain['LoRA'].values(), 2)} nats a token on the task (rate {RATES['LoRA']:g}) and full"
        f" fine-tuning {pm(gain['full'].values(), 2)} (rate {RATES['full']:g}); the loss on other text goes from"
        f" {before:.2f} up by {pm(rise['LoRA'].values(), 2)} and {pm(rise['full'].values(), 2)}, for each nat gained"
        f" {pm(per['LoRA'], 3)} and {pm(per['full'], 3)}. {new} (ΔW is {size['LoRA']:.1%} and {size['full']:.1%} of W)."
        f"{'' if keeps is not False else WHY}"
    )


EXPERIMENT = Experiment(
    name="forget",
    question="What does adapting cost: does the model forget, and does LoRA forget less than full fine-tuning?",
    section="4.2",
    claim="Nothing, as long as the frozen weights are there to go back to; what the adapted model forgets is not asked."
          " A later paper (2405.09673) says that LoRA learns less and forgets less than full fine-tuning.",
    choices=("LoRA learns less and forgets less.",
             "LoRA learns as much, and forgets less.",
             "LoRA forgets as much: its few directions are louder."),
    answer=0,
    paper={"numbers": "none; other text is not measured", "later": ["Learns Less and Forgets Less (2405.09673)",
           "intruder dimensions (2410.21228): present with LoRA, almost none with full fine-tuning"]},
    run=run,
    judge=judge,
)  # fmt: skip
