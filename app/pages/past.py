"""The menu of runs: the newest first, a page at a time, and a search among all of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from app import figures
from app.pages import owners
from app.pages.adapt import whole
from app.pages.lab import Lab
from app.runs import events
from app.runs.run import Run, describe
from lora_core.errors import UserError

LISTED, MOST = 30, 100
POINTS = 40  # of the small curve beside a run's name


def runs(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """Past runs, the newest first, and behind the first of them the recorded one: {"runs", "total", "offset"}.

    query: text (words of title, model, data, settings, status or number), status, model; limit, offset
    total: how many there are of those that are meant, without the recorded one
    """
    limit, offset = whole(query.get("limit"), LISTED), whole(query.get("offset"), 0)
    if not 1 <= limit <= MOST:
        raise UserError(f"limit is {limit}; it must be from 1 to {MOST}")
    wanted: dict[str, Any] = {
        "text": query.get("text", ""),
        "status": tuple(s for s in query.get("status", "").split(",") if s),
        "model": query.get("model") or None,
    }
    own, total = owners.listed(lab.store, limit, offset=offset, **wanted), owners.count(lab.store, **wanted)
    plain = not any(wanted.values())
    recorded = lab.store.recorded() if plain and not offset else None
    found = [*own, *([recorded] if recorded else [])]
    return {"runs": [summary(r) for r in found], "total": total, "offset": offset}


def summary(run: Run) -> dict[str, Any]:
    return {
        "id": run.id,
        "name": "recorded" if run.recorded else f"run {run.id}",
        "status": run.status,
        "recorded": run.recorded,
        "says": describe(run),
        "data": run.request.data_name,
        "loss": run.loss if run.step else None,
        "curve": curve(run.folder / events.NAME),
        "can_resume": run.status in ("stopped", "interrupted", "failed") and run.step < run.steps,
    }


def curve(path: Path) -> list[float]:
    """The training losses, smoothed and thinned, for a small drawing."""
    try:
        stat = path.stat()
    except OSError:
        return []
    return list(_curve(path, stat.st_ino, stat.st_size, stat.st_mtime_ns))


@lru_cache(maxsize=2048)
def _curve(path: Path, *changed: int) -> tuple[float, ...]:
    losses = list(enumerate(events.losses(path)))
    return tuple(round(y, 3) for y in figures.smooth([y for _, y in figures.thin(losses, POINTS)]))
