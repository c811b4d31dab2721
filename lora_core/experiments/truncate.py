"""truncate: is ΔW really of low rank, or only forced to be? Cuts of r = 64 and of full fine-tuning's ΔW, by SVD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_core.experiments.experiment import Experiment, Row
from lora_core.experiments.lab import Cell
from lora_core.experiments.nulls import gaussian_ninety, ninety, noise_edge
from lora_core.experiments.training import ranks_for, sites_of, trained
from lora_core.experiments.verdicts import above, by, interval, learnt, paired, per_seed, pm, unlearnt, verdict
from lora_core.spec import LoraSpec

if TYPE_CHECKING:
    from lora_core.experiments.lab import Lab

TARGETS, KS = ("q", "k", "v", "o", "up", "down"), (1, 2, 4, 8)
K, KEEP = 8, 0.95  # "of low rank": the 8 first directions keep 95 % of what was gained


def run(lab: Lab) -> list[Row]:
    """Per seed: training at each k and at 64, the latter cut to k; and full fine-tuning, its ΔW cut to k."""
    cells = [Cell(f"{what} {s}", lambda s=s, make=make: make(lab, s), work) for s in lab.seeds
             for what, make, work in (("lora", _lora, 4), ("full", _full, 2))]  # fmt: skip
    return [row for rows in lab.run(cells).values() for row in rows]


def _lora(lab: Lab, seed: int) -> list[Row]:
    import lora_core as lc

    model, _ = lab.encoder()
    ranks = lab.choose((K, 64), (*KS, 64))
    specs = {f"r{r}": LoraSpec(targets=TARGETS, rank=r, alpha=16) for r in ranks_for(model, TARGETS, ranks)}
    with trained(lab, specs, seed=seed, steps=lab.steps(100, 200), lr=2e-3, share=0.8) as t:
        whole = max(specs.values(), key=lambda s: s.rank)
        cuts = lc.measure_cuts(t.adapters[f"r{whole.rank}"], lambda a: t.objective, t.rows)
        rows = [{"kind": "trained", "seed": seed, "k": s.rank, **t.figures[n]} for n, s in specs.items()]
        return rows + [{"kind": "cut", "seed": seed, "k": k, **f} for k, f in cuts.cuts.items() if k in (0, *KS, 64)
                       or k == whole.rank]  # fmt: skip


def _full(lab: Lab, seed: int) -> list[Row]:
    """All matrices, norms and the head are trained; the matrices' ΔW are cut, what else was trained stays."""
    import torch

    import lora_core as lc

    model, _ = lab.encoder()
    sites = sites_of(model, TARGETS)
    spec = LoraSpec(targets=("norm",), full=tuple(s.path for s in sites))
    rows: list[Row] = []
    with trained(lab, {"full": spec}, seed=seed, steps=lab.steps(100, 200), lr=3e-4, share=0.7) as t:
        copies = t.adapters["full"].copies
        found = {}
        for s in sites:
            copy, W = copies[f"{s.path}.weight"], s.weight(model.get_submodule(s.path)).detach()
            U, S, Vh = torch.linalg.svd(copy.detach() - W, full_matrices=False)
            found[s.key] = (copy, W, U, S, Vh)
            m, n = W.shape
            rows.append({"kind": "spectrum", "seed": seed, "target": s.target, "layer": s.layer, "full": min(m, n),
                         "energy_90": ninety(S.double().numpy()), "gaussian_90": gaussian_ninety(m, n),
                         "above_edge": int((S > noise_edge(float(S.norm()), m, n)).sum())})  # fmt: skip
        for k in (0, *KS, 64, None):
            with torch.no_grad():
                for copy, W, U, S, Vh in found.values():
                    copy.copy_(W + (U[:, :k] * S[:k]) @ Vh[:k] if k != 0 else W)
            rows.append({"kind": "full cut", "seed": seed, "k": -1 if k is None else k,
                         **lc.measure(t.objective, t.rows, adapters=["full"])["full"]})  # fmt: skip
    return rows


def kept(rows: Sequence[Row], kind: str, whole: int) -> dict[int, float]:
    """{seed: share of the gain (from k = 0 to the whole) that the first 8 directions keep}."""
    none, cut, all_ = (per_seed(rows, "loss", kind=kind, k=k) for k in (0, min(K, whole) if whole > 0 else K, whole))
    return {s: (none[s] - cut[s]) / (none[s] - all_[s]) for s in all_}


def judge(rows: Sequence[Row]) -> tuple[str, str]:
    """8 directions keep 95 % of what r = 64 gains, and 95 % of what full fine-tuning gains."""
    top = max(r["k"] for r in by(rows, kind="cut"))
    gains = paired(per_seed(rows, "loss", kind="cut", k=0), per_seed(rows, "loss", kind="cut", k=top))
    if not learnt(gains):
        return unlearnt(gains)
    lora, full = kept(rows, "cut", top), kept(rows, "full cut", -1)
    least = min(K, top)
    late = paired(per_seed(rows, "loss", kind="trained", k=least), per_seed(rows, "loss", kind="cut", k=least))
    spectra = by(rows, kind="spectrum")
    ninety, null = (interval([r[c] / r["full"] for r in spectra])[0] for c in ("energy_90", "gaussian_90"))
    edge = interval([r["above_edge"] for r in spectra])[0]
    return verdict([above(lora.values(), KEEP), above(full.values(), KEEP)]), (
        f"Cut to {least} directions, r = {top} keeps {pm([100 * v for v in lora.values()], 1)} % of its gain, and full"
        f" fine-tuning's ΔW {pm([100 * v for v in full.values()], 1)} % of what its matrices gain. Its 90 % of Σσ² take"
        f" {ninety:.0%} of the directions, Gaussian noise {null:.0%}; {edge:.1f} a matrix stand above the"
        f" Marchenko–Pastur edge. Training at rank {least} ends {pm(late)} nats above that cut."
    )


EXPERIMENT = Experiment(
    name="truncate",
    question="Is ΔW really of low rank, or is it only forced to be?",
    section="7.2",
    claim="The update has a small intrinsic rank: increasing r does not cover a more meaningful subspace.",
    choices=("Really: cut to 8 directions, even full fine-tuning's ΔW does nearly as well.",
             "LoRA's ΔW is of low rank because it is made so; that of full fine-tuning is not.",
             "Neither is: cutting loses much in both."),
    answer=0,
    paper={"numbers": "none of cuts; Table 6 and figures 3 and 4 are read as evidence"},
    run=run,
    judge=judge,
)  # fmt: skip
