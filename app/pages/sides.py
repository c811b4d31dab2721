"""Side by side: what a run can stand beside, how well two adapters would merge, and their sum's loss on both tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app import figures_compare
from app.pages import compare, held, owners, words
from app.pages.lab import Lab, title
from app.pages.side import Side, attached, other_run
from app.pages.train import where
from app.runs.run import Run, describe
from lora_core.errors import UserError

LISTED = 30
ROWS = 32  # held-out rows of each task that the sum is measured on
FIT = 0.1  # of the cosine: above it two updates are called related


def others(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """The runs that can stand beside one, the newest first: those of the same model that have an adapter."""
    run = lab.run(query.get("run"))
    recorded = lab.store.recorded()
    found = [r for r in [*lab.runs(LISTED), *([recorded] if recorded else [])]
             if r.adapter is not None and r.request.model == run.request.model]  # fmt: skip
    return {"run": run.id, "runs": [{"id": r.id, "name": name(r), "says": describe(r), "data": r.request.data_name,
                                     "loss": r.loss if r.step else None} for r in found]}  # fmt: skip


def name(run: Run) -> str:
    return run.request.title or ("recorded" if run.recorded else f"run {run.id}")


def fit(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """How well two runs' adapters would merge: norms, cosine and shared directions, with two figures and a sentence.

    query: run, other; m (the matrix whose spectra are overlaid; the one that both changed most if it is not in both)
    """
    from lora_core.files import read_adapter
    from lora_core.merge_fit import merge_fit
    from lora_core.spectra import spectra

    run = lab.run(query.get("run"))
    other = other_run(lab, run, query.get("other"))
    if run.adapter is None:
        raise UserError(f"{title(run)} has no adapter to compare with")
    one, two = read_adapter(run.adapter), read_adapter(other.adapter)  # type: ignore[arg-type]
    found = merge_fit(one, two)
    answer: dict[str, Any] = {"run": run.id, "other": other.id, "norms": list(found.norms), "cosine": found.cosine,
                              "reads": found.reads, "chance": found.chance, "alone": list(found.alone),
                              "shared": len(found.pairs), "say": sentence(name(run), name(other), found),
                              "figures": {}, "rows": []}  # fmt: skip
    if not found.pairs:
        return answer
    layers: dict[str, list[tuple[int, float]]] = {}
    heads = ("matrix", "norm 1", "norm 2", "cosine", "phi of inputs", "phi of outputs", "by chance", "smallest angle")
    rows: list[list[Any]] = [list(heads)]
    for p in found.pairs:
        layer, target = where(p.key)
        if layer is not None:
            layers.setdefault(target, []).append((layer, p.reads))
        numbers = (*p.norms, p.cosine, p.reads, p.writes, p.chance_reads, p.angle)
        rows.append([f"layers.{layer}.{target}", *numbers])
    at = {"layers.{}.{}".format(*where(p.key)): p.key for p in found.pairs}
    most = max(found.pairs, key=lambda p: p.norms[0] * p.norms[1]).key
    key = at.get(query.get("m", ""), most)
    layer, target = where(key)
    sigma = [[float(v) for v in spectra(s)[key].singular_values] for s in (one, two)]
    names = [name(run), name(other)]
    answer["rows"], answer["m"] = rows, f"layers.{layer}.{target}"
    answer["figures"] = {
        "spectra": figures_compare.spectra_of_two(sigma, names, f"layer {layer}, {target}"),
        "similarity": figures_compare.similarity({t: sorted(v) for t, v in layers.items()}, found.chance),
    }
    return answer


def sentence(one: str, two: str, found: Any) -> str:
    """Whether they would merge, from the numbers."""
    if not found.pairs:
        return f"{one} and {two} change no matrix in common: their sum does both without a clash of matrices."
    ratio = found.reads / found.chance if found.chance else 0.0
    overlap, times = words.short(found.reads, 2), words.short(ratio, 2)
    share = f"the inputs that they read overlap by φ = {overlap}, {times} times chance"
    sizes = f"‖ΔW‖ is {words.short(found.norms[0])} and {words.short(found.norms[1])}"
    cosine = f"cosine {found.cosine:.2f}".replace("-", "−")
    if found.cosine > FIT:
        return f"Partly the same update ({cosine}): the sum counts what they share twice; {share}. {sizes}."
    if found.cosine < -FIT:
        return f"Partly opposite updates ({cosine}): the sum undoes some of both; {share}. {sizes}."
    return f"Nearly unrelated updates ({cosine}): by the weights alone they should merge; {share}. {sizes}."


def summed(lab: Lab, body: Mapping[str, Any]) -> dict[str, Any]:
    """The held-out loss of the base, of two runs' adapters and of their sum on the rows of either's task, in one batch.

    body: run, other, page, seq; a newer question of the page ends it, with {"stale": True}
    """
    from lora_core.dials import Interrupted, interruptible, losses_together

    run = lab.run(body.get("run"))
    other = other_run(lab, run, body.get("other"))
    if run.id == other.id:
        raise UserError("choose two adapters: one by itself has no sum")
    page, seq = f"sum-{owners.page(body.get('page'))}", body.get("seq", 0)
    seq = seq if isinstance(seq, int) else 0
    compare.TICKETS.take(page, seq)
    sides = [Side(), Side(run=run), Side(run=other), Side(run=run, plus=other)]
    tasks = []
    with lab.session.model(run.request.model) as loaded:
        names = attached(lab, loaded, sides)
        with interruptible(loaded.model, names, lambda: compare.TICKETS.stale(page, seq)):
            try:
                for each in (run, other):
                    objective, items = held.encoded(lab, each, loaded)
                    sums, count = [0.0] * 4, 0
                    for _, values, labelled in losses_together(objective, items[:ROWS], names):
                        sums, count = [a + b for a, b in zip(sums, values, strict=True)], count + labelled
                    tasks.append({"data": each.request.data_name, "rows": len(items[:ROWS]),
                                  "losses": [s / count for s in sums]})  # fmt: skip
            except Interrupted:
                return {"stale": True}
    return {"run": run.id, "other": other.id, "names": ["base", name(run), name(other), "their sum"], "tasks": tasks,
            "say": verdict(name(run), name(other), tasks)}  # fmt: skip


def verdict(one: str, two: str, tasks: list[dict[str, Any]]) -> str:
    """How much of either's gain the sum keeps."""
    parts = []
    for i, (who, t) in enumerate(zip((one, two), tasks, strict=True)):
        base, own, both = t["losses"][0], t["losses"][1 + i], t["losses"][3]
        if base > own:
            share = 100 * (base - both) / (base - own)
            parts.append(f"{share:.0f} % of what {who} learnt on {t['data']}" if share >= 0 else
                         f"nothing of what {who} learnt on {t['data']}")  # fmt: skip
    return f"Added up they keep {' and '.join(parts)}." if parts else "Neither has learnt anything that could be kept."
