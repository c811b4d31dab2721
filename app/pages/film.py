"""Train's live spectrum: the singular values of one ΔW at every picture of a run, as they came."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from app import figures_train
from app.pages.lab import Lab, title
from app.pages.train import where
from app.runs.run import Run
from lora_core.families import TITLES

MATRIX = re.compile(r"(?:layers\.)?(\d{1,5})\.([\w-]{1,40})")


def film(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """The film of one matrix, `m` = "layers.12.v"; of the one that grew most where that one has none."""
    run = lab.run(query.get("run"))
    pictures = [(0 if e["kind"] == "base" else int(e["step"]), e["sigma"])
                for e in lab.store.events(run.id) if e.get("sigma")]  # fmt: skip
    answer: dict[str, Any] = {"run": run.id, "name": title(run), "live": run.live, "steps": []}
    if not pictures:
        return answer | {"say": missing(run)}
    names = pictures[-1][1]
    key = named(names, query.get("m") or "") or max(names, key=lambda k: names[k][0] if names[k] else 0.0)
    by_step = {step: sigma[key] for step, sigma in pictures if key in sigma}
    steps, sigma = sorted(by_step), [by_step[s] for s in sorted(by_step)]
    figure = figures_train.film(steps, sigma, last=run.steps if run.live else 0, revision=f"{run.id}.{key}")
    return answer | {"m": address(key), "title": titled(key), "path": key, "steps": steps, "sigma": sigma,
                     "figure": figure}  # fmt: skip


def missing(run: Run) -> str:
    """Why there are no pictures (yet)."""
    if run.request.spec.get("dora"):
        return "DoRA's ΔW is no product B·A and takes too long to decompose while it trains; Spectra has it after."
    if run.live:
        return "B is zero at the start; the first picture comes with the first step."
    return "No spectra were kept of this run: it has no B·A, or is of an older version."


def named(keys: Iterable[str], m: str) -> str | None:
    """The site's key of a matrix as the page's address has it, "layers.12.v"; None where it is none of these."""
    asked = MATRIX.fullmatch(m)
    return next((k for k in keys if asked and where(k) == (int(asked[1]), asked[2])), None)


def address(key: str) -> str:
    """How a matrix is named in the page's address."""
    layer, name = where(key)
    return f"layers.{layer}.{name}"


def titled(key: str) -> str:
    """ "layer 12, v (value)"."""
    layer, name = where(key)
    return f"layer {layer}, {name}" + (f" ({TITLES[name]})" if name in TITLES and TITLES[name] != name else "")
