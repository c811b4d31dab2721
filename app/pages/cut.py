"""The dials of one run for the page, and saving what stands on them as an adapter of its own."""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.pages import held, owners
from app.pages.lab import Lab, title
from app.pages.settings import STRENGTHS, Setting, cuts_of, setting_of
from app.pages.train import grid
from app.runs.folder import ADAPTER
from app.runs.run import Run
from lora_core.errors import UserError


def dials(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """All ticks of a run's dials with what is kept and what that takes, and the update's size in every matrix."""
    run = lab.run(query.get("run"))
    cuts = cuts_of(run)
    norms = {key: float((s * s).sum() ** 0.5) for key, s in cuts.plan.sigma.items()}
    return {
        "run": run.id,
        "name": title(run),
        "ticks": cuts.on_page,
        "strengths": [] if cuts.dora else list(STRENGTHS),
        "dora": cuts.dora,
        "norms": grid(norms),
        "matrices": len(cuts.plan.most),
        "rank": max(cuts.plan.most.values()),
    }


def save(lab: Lab, body: Mapping[str, Any]) -> dict[str, Any]:
    """Write what stands on the dials as an adapter of a new run, read it back, and measure how far it is from what was
    shown. body: run, setting."""
    import lora_core as lc
    from lora_core.dials import losses_together

    run = owners.rows(lab.run(body.get("run")))
    owners.may_keep(lab.store)
    cuts = cuts_of(run)
    setting = setting_of(cuts, body.get("setting"))
    if setting.base:
        raise UserError("nothing of ΔW is left with these dials: that is the base model, and there is nothing to save")
    assert run.adapter is not None
    ranks = dict(setting.ranks) if setting.ranks is not None else dict(cuts.plan.most)
    new = made(lab, run, max(ranks.values()), told(setting, cuts.plan.most))
    folder = new.folder / ADAPTER
    try:
        written = cuts.plan.write(folder, ranks, setting.strength)
        with lab.session.model(run.request.model) as loaded:
            shown = lab.session.dialled(loaded, run.id, run.adapter, ranks, setting.strength, slot=8)
            back = lc.load_adapter(loaded.model, folder, f"run-{new.id}-read-back", allow_zero=True)
            back.enable(False)
            try:
                objective, items = held.encoded(lab, run, loaded)
                sums, count = [0.0, 0.0], 0
                for _, values, labelled in losses_together(objective, items, [shown, back.name]):
                    sums, count = [a + b for a, b in zip(sums, values, strict=True)], count + labelled
            finally:
                back.detach()
        before, after = (s / count for s in sums)
        lab.store.claim(new.id)
        lab.store.finish(new.id, "done", step=run.step, base_loss=run.base_loss, loss=after, adapter=True,
                         result={"cut_from": run.id, "kept_energy": written.kept_energy,
                                 "file_bytes": written.file_bytes})  # fmt: skip
    except BaseException:
        lab.store.delete(new.id)
        raise
    return {"run": new.id, "from": run.id, "bytes": written.file_bytes, "before_bytes": written.before_bytes,
            "shown": before, "saved": after, "rows": len(items), "rounding": written.rounding,
            "kept": written.kept_energy, "title": new.request.title}  # fmt: skip


def made(lab: Lab, run: Run, rank: int, what: str) -> Run:
    """A run for an adapter that is not trained but cut out of another one's; in no queue, and begun by nobody."""
    request = run.request
    spec = {**request.spec, "rank": max(1, rank), "alpha": float(max(1, rank)), "rank_pattern": {}, "alpha_pattern": {}}
    copies = {}
    for name in ("data", "test"):  # the user's file may have gone; the run has a copy
        own = getattr(request, name)
        if own and not Path(own).exists() and (copy := next(run.folder.glob(f"{name}.*"), None)):
            copies[name] = str(copy)
    return lab.store.create(replace(request, spec=spec, title=f"{title(run)}, {what}", **copies),
                            owner=owners.owner())  # fmt: skip


def told(setting: Setting, most: Mapping[str, int]) -> str:
    """What is kept, in a few words: "2 of 8 directions", "12 of 60 matrices", "strength 0.5"."""
    words = []
    if setting.ranks is not None:
        on = {key: n for key, n in setting.ranks.items() if n}
        if on:
            low, high, top = min(on.values()), max(on.values()), max(most.values())
            if any(n < most[key] for key, n in on.items()):
                words.append(f"{low} of {top} directions" if low == high else f"{low} to {high} of {top} directions")
        if len(on) < len(most):
            words.append(f"{len(on)} of {len(most)} matrices")
    if setting.strength != 1:
        words.append(f"strength {setting.strength:g}")
    return ", ".join(words) or "all of it"


def packed(lab: Lab, query: Mapping[str, str]) -> tuple[str, bytes]:
    """(name, zip) of a run's adapter folder, for download."""
    run = owners.taken(lab.run(query.get("run")))
    if run.adapter is None or not run.adapter.is_dir():
        raise UserError(f"{title(run)} has no adapter to take along")
    name = "recorded-adapter" if run.recorded else f"run-{run.id}-adapter"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as z:
        for path in sorted(p for p in run.adapter.iterdir() if p.is_file()):
            with path.open("rb") as f, z.open(f"{name}/{path.name}", "w") as to:
                shutil.copyfileobj(f, to)
    return f"{name}.zip", out.getvalue()
