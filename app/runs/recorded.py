"""The run that comes with LoRA Lab: made by `app.runs.record`, read-only, number 0."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from app.runs.run import Run, RunRequest

RECORDED = Path(__file__).parent.parent / "recorded"
RUN, TEXTS = "run.json", "texts.json"


def recorded_run(folder: Path = RECORDED) -> Run | None:
    """The recorded run in a folder, or None when there is none."""
    try:
        return _read(folder, (folder / RUN).stat().st_mtime_ns)
    except OSError:
        return None


def recorded_texts(folder: Path = RECORDED) -> dict[str, Any]:
    """Its texts: {"command", "examples": [{"prompt", "reference", "base", "adapted", "tokens"}]}.

    tokens: `TokenDiff.to_dict()` of each token of the adapted text
    """
    try:
        return json.loads((folder / TEXTS).read_text(encoding="utf-8"))
    except OSError:
        return {"command": "", "examples": []}


@lru_cache(maxsize=4)
def _read(folder: Path, changed: int) -> Run:
    d = json.loads((folder / RUN).read_text(encoding="utf-8"))
    adapter = folder / "adapter"
    return Run(id=0, status=d["status"], request=RunRequest.stored(d["request"]), folder=folder, created=d["created"],
               started=d["started"], ended=d["ended"], attempts=d["attempts"], step=d["step"], steps=d["steps"],
               base_loss=d["base_loss"], loss=d["loss"], score=d["score"], result=d["result"],
               adapter=adapter if adapter.is_dir() else None, recorded=True, shared=True)  # fmt: skip
