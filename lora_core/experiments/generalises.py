"""generalises: does LoRA on all matrices, with all biases, become full fine-tuning as its rank grows?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_core.experiments.experiment import Experiment, Row
from lora_core.experiments.rivals import Rival, compare
from lora_core.experiments.training import ranks_for, sites_of
from lora_core.experiments.verdicts import above, by, every, learnt, paired, per_seed, pm, unlearnt, verdict
from lora_core.spec import LoraSpec

if TYPE_CHECKING:
    from lora_core.experiments.lab import Lab

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TRIED = {"full": RATES[0:3], "lora": RATES[1:4], "bottleneck": RATES[2:5], "prefix": RATES[4:7]}
FULL_RANK = 65536  # cut to what the matrices can have
SLACK = 0.02  # nats: "roughly" full fine-tuning


def run(lab: Lab) -> list[Row]:
    """LoRA on everything at growing ranks, adapter layers and prefixes at growing sizes, and full fine-tuning."""
    return compare(lab, lambda: rivals(lab), RATES, lab.steps(50, 80))


def rivals(lab: Lab) -> dict[str, Rival]:
    """{name: Rival}. LoRA's α is fixed and s = α/r, as in the paper; norms are trained with the biases, since a full
    fine-tune trains them; embeddings are not."""
    model, _ = lab.encoder()
    matrices = tuple(dict.fromkeys(s.target for s in sites_of(model, ("q", "k", "v", "o", "gate", "up", "down"))))
    most = int(getattr(model.config, "max_position_embeddings", 128)) // 8
    found = {"full": Rival(LoraSpec(targets=(), full=("all",)), TRIED["full"], {"kind": "full", "size": None})}
    for r in ranks_for(model, matrices, lab.choose((1, 8, FULL_RANK), (1, 4, 16, 64, FULL_RANK))):
        spec = LoraSpec(targets=(*matrices, "bias", "norm"), rank=r, alpha=16)
        found[f"lora-{r}"] = Rival(spec, TRIED["lora"], {"kind": "lora", "size": r})
    for m in lab.choose((64,), (4, 64)):
        found[f"bottleneck-{m}"] = Rival(LoraSpec(targets=(), bottleneck=m), TRIED["bottleneck"],
                                         {"kind": "bottleneck", "size": m})  # fmt: skip
    for n in sorted({min(n, most) for n in lab.choose((16,), (4, 64))}):
        found[f"prefix-{n}"] = Rival(LoraSpec(targets=(), prefix=n), TRIED["prefix"], {"kind": "prefix", "size": n})
    return found


def judge(rows: Sequence[Row]) -> tuple[str, str]:
    """At full rank within 0.02 nats of full fine-tuning, and no farther from it than at rank 1."""
    full = per_seed(rows, "loss", kind="full")
    gains = [r["base_loss"] - r["loss"] for r in by(rows, kind="full")]
    if not learnt(gains):
        return unlearnt(gains)
    ranks = sorted({r["size"] for r in by(rows, kind="lora")})
    gap = {r: paired(per_seed(rows, "loss", kind="lora", size=r), full) for r in ranks}
    top, low = gap[ranks[-1]], gap[ranks[0]]
    near = every([above(top, -SLACK), above([-g for g in top], -SLACK)])
    nearer = above([abs(a) - abs(b) for a, b in zip(low, top)], -SLACK)
    over = ", ".join(f"{pm(g)} at rank {r}" for r, g in gap.items())
    fit = {r: pm(paired(per_seed(rows, "train_loss", kind="lora", size=r), per_seed(rows, "train_loss", kind="full")))
           for r in (ranks[0], ranks[-1])}  # fmt: skip
    rest = []
    for kind, words in (("bottleneck", "adapter layers of {} units"), ("prefix", "a prefix of {} tokens")):
        size = max(r["size"] for r in by(rows, kind=kind))
        rest.append(f"{words.format(size)} {pm(paired(per_seed(rows, 'loss', kind=kind, size=size), full))}")
    return verdict([near, nearer]), (
        f"Full fine-tuning ends at {pm(full.values())} nats. LoRA on all matrices, with biases, ends above it by {over}"
        f" (in training by {fit[ranks[0]]} and {fit[ranks[-1]]} at the least and the full rank); {' and '.join(rest)}."
    )


EXPERIMENT = Experiment(
    name="generalises",
    question="In what sense is LoRA a generalisation of full fine-tuning?",
    section="4.1",
    claim="With LoRA on all matrices, and all biases trained, a growing rank roughly recovers full fine-tuning; adapter"
          " layers grow into an MLP instead, and prefixes into a model that cannot take long inputs.",
    choices=("It stays worse, whatever the rank: the product has another shape.",
             "As the rank grows it comes to what full fine-tuning reaches.",
             "Only in theory: at full rank it does not train."),
    answer=1,
    paper={"numbers": "none; an argument of section 4.1"},
    run=run,
    judge=judge,
)  # fmt: skip
