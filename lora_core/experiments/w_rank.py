"""w-rank: is W itself rank-deficient? Its spectra, and the loss when every W is cut, beside ΔW cut in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_core.experiments.experiment import Experiment, Row
from lora_core.experiments.lab import Cell
from lora_core.experiments.nulls import gaussian_ninety
from lora_core.experiments.training import ranks_for, short, trained
from lora_core.experiments.verdicts import above, by, pm, verdict
from lora_core.spec import LoraSpec

if TYPE_CHECKING:
    from lora_core.experiments.lab import Lab

SHARES = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of min(out, in) directions of every matrix
LONGEST = 45  # tokens of a row, for time's sake
BLOCKS, KEEP = 3, 0.95  # disjoint parts of the held-out rows; "keeps": this much of what the whole matrices gain
ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")


def run(lab: Lab) -> list[Row]:
    """Spectra of all matrices of the writer, cuts of all of them at once, and cuts of a trained ΔW on the same rows."""
    cells = [Cell("spectra", lambda: _spectra(lab), 12), *(Cell(f"W {s}", lambda s=s: _cut(lab, s), 4) for s in SHARES)]
    seeds = lab.seeds[: lab.choose(1, 3)]
    cells += [Cell(f"delta {s}", lambda s=s: _delta(lab, s), 20) for s in seeds]
    return [row for value in lab.run(cells).values() for row in value]


def _svds(lab: Lab) -> dict[str, tuple[Any, Any, Any, Any]]:
    """{key: (site, U, σ, Vh)} of every matrix; kept with the lab, for all cells."""
    import torch

    from lora_core.errors import UserError
    from lora_core.sites import find_sites

    model, _ = lab.writer()

    def make() -> dict[str, tuple[Any, Any, Any, Any]]:
        sites = [s for s in find_sites(model) if s.target in ATTENTION + MLP]
        if odd := next((s.key for s in sites if isinstance(s.rows, torch.Tensor)), None):
            raise UserError(f"{odd} is interleaved with other matrices, and cannot be cut in place")
        found = {}
        for i, s in enumerate(sites):
            lab.at(i / len(sites))
            found[s.key] = (s, *torch.linalg.svd(s.weight(model.get_submodule(s.path)).detach(), full_matrices=False))
        return found

    return lab.keep("svds", make)


def _spectra(lab: Lab) -> list[Row]:
    from lora_core.spectra import spectrum_of

    rows: list[Row] = []
    for key, (s, _, S, _) in _svds(lab).items():
        f = spectrum_of(key, s.target, s.layer, len(S), (s.out, s.in_), S.double().numpy())
        rows.append({"kind": "spectrum", "target": s.target, "layer": s.layer, "full": len(S),
                     "stable": f.stable_rank, "entropy": f.entropy_rank, "energy_90": f.energy_90,
                     "gaussian_90": gaussian_ninety(s.out, s.in_)})  # fmt: skip
    return rows


def _blocks(lab: Lab) -> tuple[Any, list[Any]]:
    import lora_core as lc

    model, tokenizer = lab.writer()
    task = lc.load_task("restaurant", train=1, test=lab.choose(90, 240))
    goal = lc.CausalLM(model, tokenizer, task.template)
    rows = short(goal, task.test, LONGEST)[: lab.choose(18, 48)]
    return goal, [rows[i::BLOCKS] for i in range(BLOCKS)]


def _cut(lab: Lab, share: float) -> list[Row]:
    """The loss with every matrix cut to that share of its directions."""
    import torch

    import lora_core as lc

    svds = _svds(lab)
    model, _ = lab.writer()
    goal, blocks = _blocks(lab)
    views = {key: s.weight(model.get_submodule(s.path)).data for key, (s, *_) in svds.items()}
    whole = {key: view.clone() for key, view in views.items()}
    try:
        for key, (_, U, S, Vh) in svds.items():
            k = round(share * len(S))
            if k < len(S):
                views[key].copy_((U[:, :k] * S[:k]) @ Vh[:k] if k else torch.zeros_like(views[key]))
        losses = [lc.measure(goal, rows)[None]["loss"] for rows in blocks]
    finally:
        for key, W in whole.items():
            views[key].copy_(W)
    return [{"kind": "W", "share": share, "block": i, "loss": loss} for i, loss in enumerate(losses)]


def _delta(lab: Lab, seed: int) -> list[Row]:
    """ΔW of all matrices, trained at r = 8 and cut to k on the very same rows."""
    import lora_core as lc

    model, _ = lab.writer()
    goal, blocks = _blocks(lab)
    targets = tuple(dict.fromkeys(s.target for s, *_ in _svds(lab).values()))
    rank = ranks_for(model, targets, (8,))[0]
    spec = LoraSpec(targets=targets, rank=rank, alpha=16)
    with trained(lab, {"delta": spec}, seed=seed, steps=lab.steps(16, 30), lr=2e-3, batch=lab.choose(2, 4),
                 task="restaurant", share=0.8, held=1, longest=LONGEST) as t:  # fmt: skip
        cuts = lc.measure_cuts(t.adapters["delta"], lambda a: goal, [r for block in blocks for r in block])
    full = float(np.mean([len(S) for _, _, S, _ in _svds(lab).values()]))
    return [{"kind": "delta", "seed": seed, "rank": k, "share": k / full, "loss": v["loss"]}
            for k, v in {0: cuts.base, **cuts.cuts}.items()]  # fmt: skip


def judge(rows: Sequence[Row]) -> tuple[str, str]:
    """Spectrum: fewer directions than noise needs. Function: half of the directions keep 95 % of what all gain."""
    spectra = by(rows, kind="spectrum")
    fewer = above([r["gaussian_90"] / r["full"] - r["energy_90"] / r["full"] for r in spectra])
    loss = {s: [r["loss"] for r in by(rows, kind="W", share=s)] for s in SHARES}
    kept = {s: [(z - x) / (z - w) for z, x, w in zip(loss[0.0], loss[s], loss[1.0])] for s in SHARES}
    half = above(kept[0.5], KEEP)
    enough = min((s for s in SHARES if sum(kept[s]) / BLOCKS >= KEEP), default=1.0)
    energy = [r["energy_90"] / r["full"] for r in spectra]
    null = [r["gaussian_90"] / r["full"] for r in spectra]
    delta = by(rows, kind="delta", seed=by(rows, kind="delta")[0]["seed"])
    base, whole = delta[0]["loss"], delta[-1]["loss"]
    least = min((r["rank"] for r in delta if base - r["loss"] >= KEEP * (base - whole)), default=delta[-1]["rank"])
    return verdict([fewer, half]), (
        f"90 % of Σσ² lie in {sum(energy) / len(energy):.0%} of W's directions (a Gaussian matrix:"
        f" {sum(null) / len(null):.0%}); half of the directions of every W keep {pm([100 * k for k in kept[0.5]], 1)} %"
        f" of what the whole matrices gain, and 95 % take {enough:.0%} of them. Of a ΔW trained at rank"
        f" {delta[-1]['rank']}, {least} direction{'s' if least != 1 else ''} of each matrix"
        f" keep{'' if least != 1 else 's'} 95 % of its gain, {least / delta[-1]['rank'] * delta[-1]['share']:.1%} of"
        " the full rank."
    )


EXPERIMENT = Experiment(
    name="w-rank",
    question="If ΔW is rank-deficient, is W too?",
    section="8",
    claim="The rank-deficiency of ΔW suggests that W could be rank-deficient as well (a question left to future work).",
    choices=("Yes: W can lose half of its directions and hardly anything is lost.",
             "Its spectrum decays, but the small directions matter.",
             "No: its spectrum is as flat as noise."),
    answer=0,
    paper={"numbers": "none; a suggestion of section 8"},
    run=run,
    judge=judge,
)  # fmt: skip
