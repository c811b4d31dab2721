"""truncate: is ΔW really of low rank, or only forced to be? Cuts of r = 64 and of full fine-tuning's ΔW, by SVD."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_core.experiments.experiment import Experiment, Row
from lora_core.experiments.lab import Cell
from lora_core.experiments.nulls import gaussian_ninety, ninety, noise_edge
from lora_core.experiments.training import Trained, ranks_for, sites_of, trained
from lora_core.experiments.verdicts import above, by, interval, learnt, paired, per_seed, pm, unlearnt, verdict
from lora_core.spec import LoraSpec

if TYPE_CHECKING:
    from lora_core.experiments.lab import Lab
    from lora_core.sites import Site

TARGETS, KS = ("q", "k", "v", "o", "up", "down"), (1, 2, 4, 8)
SAMPLE = 128  # rows whose inputs weight a cut
K, KEEP = 8, 0.95  # "of low rank": the 8 first directions keep 95 % of what was gained


def run(lab: Lab) -> list[Row]:
    """Per seed: training at each k and at 64, the latter cut to k; and full fine-tuning, its ΔW cut to k."""
    cells = [Cell(f"{what} {s}", lambda s=s, make=make: make(lab, s), work) for s in lab.seeds
             for what, make, work in (("lora", _lora, 4), ("full", _full, 2))]  # fmt: skip
    return [row for rows in lab.run(cells).values() for row in rows]


def _lora(lab: Lab, seed: int) -> list[Row]:
    import torch

    model, _ = lab.encoder()
    ranks = lab.choose((K, 64), (*KS, 64))
    specs = {f"r{r}": LoraSpec(targets=TARGETS, rank=r, alpha=16) for r in ranks_for(model, TARGETS, ranks)}
    with trained(lab, specs, seed=seed, steps=lab.steps(50, 80), lr=2e-3, share=0.8) as t:
        rows: list[Row] = [{"kind": "trained", "seed": seed, "k": s.rank, **t.figures[n]} for n, s in specs.items()]
        whole = max(specs.values(), key=lambda s: s.rank).rank
        a = t.adapters[name := f"r{whole}"]
        deltas = {key: a.delta(key).dense().double() for key in a.sites}

        def put(key: str, B: torch.Tensor, A: torch.Tensor) -> None:
            f, k = a.factors(key), len(A)
            f.A.zero_()
            f.B.zero_()
            f.A[:k], f.B[:, :k] = A, B / f.scaling

        return rows + _cuts(t, name, a.sites, deltas, put, "cut", whole)


def _full(lab: Lab, seed: int) -> list[Row]:
    """All matrices, norms and the head are trained; the matrices' ΔW are cut, what else was trained stays."""
    import torch

    model, _ = lab.encoder()
    sites = sites_of(model, TARGETS)
    spec = LoraSpec(targets=("norm",), full=tuple(s.path for s in sites))
    rows: list[Row] = []
    with trained(lab, {"full": spec}, seed=seed, steps=lab.steps(50, 80), lr=3e-4, share=0.7) as t:
        copies = t.adapters["full"].copies
        W = {s.key: s.weight(model.get_submodule(s.path)).detach() for s in sites}
        views = {s.key: s.of(copies[f"{s.path}.{s.param}"].detach()) for s in sites}
        deltas = {key: (views[key] - W[key]).double() for key in W}
        for s in sites:
            S = torch.linalg.svdvals(deltas[s.key])
            m, n = W[s.key].shape
            rows.append({"kind": "spectrum", "seed": seed, "target": s.target, "layer": s.layer, "full": min(m, n),
                         "energy_90": ninety(S.numpy()), "gaussian_90": gaussian_ninety(m, n),
                         "above_edge": int((S > noise_edge(float(S.norm()), m, n)).sum())})  # fmt: skip

        def put(key: str, B: torch.Tensor, A: torch.Tensor) -> None:
            views[key].copy_(W[key] + B @ A)

        return rows + _cuts(t, "full", {s.key: s for s in sites}, deltas, put, "full cut", -1)


def _cuts(t: Trained, name: str, sites: Mapping[str, Site], deltas: Mapping[str, Any], put: Callable[..., None],
          kind: str, whole: int) -> list[Row]:  # fmt: skip
    """The held-out figures with every ΔW cut to its first k directions, plainly and weighted by the inputs."""
    import torch

    import lora_core as lc
    from lora_core.evaluate import only
    from lora_core.experiments.inputs import directions, inputs, root

    with only(t.model, name):
        given = inputs(t.objective, list(sites.values()), t.task.train[:SAMPLE])
    roots = {path: root(X) for path, X in given.items()}  # q, k and v are given the same
    rows: list[Row] = [{"kind": kind, "seed": t.seed, "k": whole, **t.figures[name]}]
    for weighted in (False, True):
        ordered = {key: directions(D, roots[sites[key].path] if weighted else None) for key, D in deltas.items()}
        for k in (*(() if weighted else (0,)), *KS):
            with torch.no_grad():
                for key, (B, A) in ordered.items():
                    put(key, B[:, :k].float(), A[:k].float())
            rows.append({"kind": kind + ", weighted" * weighted, "seed": t.seed, "k": k,
                         **lc.measure(t.objective, t.rows, adapters=[name])[name]})  # fmt: skip
    return rows


def kept(rows: Sequence[Row], kind: str, whole: int) -> dict[int, float]:
    """{seed: share of the gain (from k = 0 to the whole) that the first 8 directions keep}."""
    plain = kind.partition(",")[0]
    none, all_ = (per_seed(rows, "loss", kind=plain, k=k) for k in (0, whole))
    cut = per_seed(rows, "loss", kind=kind, k=K)
    return {s: (none[s] - cut[s]) / (none[s] - all_[s]) for s in all_}


def judge(rows: Sequence[Row]) -> tuple[str, str]:
    """8 directions keep 95 % of what r = 64 gains, and 95 % of what full fine-tuning gains."""
    top = max(r["k"] for r in by(rows, kind="cut"))
    gains = paired(per_seed(rows, "loss", kind="cut", k=0), per_seed(rows, "loss", kind="cut", k=top))
    if not learnt(gains):
        return unlearnt(gains)
    share = {kind: [100 * v for v in kept(rows, kind, whole).values()] for kind, whole in
             (("cut", top), ("cut, weighted", top), ("full cut", -1), ("full cut, weighted", -1))}  # fmt: skip
    least = min(K, top)
    late = paired(per_seed(rows, "loss", kind="trained", k=least), per_seed(rows, "loss", kind="cut", k=K))
    spectra = by(rows, kind="spectrum")
    ninety, null = (interval([r[c] / r["full"] for r in spectra])[0] for c in ("energy_90", "gaussian_90"))
    edge = interval([r["above_edge"] for r in spectra])[0]
    return verdict([above(share["cut"], 100 * KEEP), above(share["full cut"], 100 * KEEP)]), (
        f"Cut to {K} directions a matrix, r = {top} keeps {pm(share['cut'], 1)} % of its gain, and full fine-tuning's"
        f" ΔW {pm(share['full cut'], 1)} %; cuts that heed the inputs keep {pm(share['cut, weighted'], 1)} and"
        f" {pm(share['full cut, weighted'], 1)} %. By its spectrum, 90 % of Σσ² of full fine-tuning's ΔW take"
        f" {ninety:.0%} of the directions (Gaussian noise: {null:.0%}); {edge:.0f} a matrix stand above the edge of"
        f" noise. Training at rank {least} ends {pm(late)} nats above the cut to it."
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
