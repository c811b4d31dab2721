"""What the live line says when a run does not go on: its process is silent, or the queue cannot begin it."""

from __future__ import annotations

from app.pages import words
from app.pages.lab import Lab, title
from app.runs.process import SILENT_S
from app.runs.queue import HANG_S
from app.runs.run import Run


def line(lab: Lab, run: Run, says: str) -> str:
    """`says`, unless there is more to say."""
    if run.status == "running":
        age = lab.store.heartbeat_age(run.id)
        if age is not None and age > SILENT_S:
            bound = words.duration(HANG_S)
            return f"{title(run)} has given no sign of life for {words.duration(age)}; after {bound} it is ended"
    if run.status == "queued" and lab.queue.warned:
        return f"{says}: {lab.queue.warned}"
    return says
