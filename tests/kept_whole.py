"""What must be true of a store after any kill: finished runs are what they were, and no run has a wrong curve."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from app.runs.run import Run
from app.runs.store import RunStore
from tests.runs_kit import adapter_sum


def hashes(folder: Path) -> dict[str, str]:
    """{name: SHA-256} of what a finished run consists of."""
    files = [folder / "request.json", folder / "events.jsonl", *sorted((folder / "adapter").rglob("*"))]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


def half_written(root: Path) -> list[str]:
    """Names that only something in the making has."""
    return [str(p.relative_to(root)) for p in (*root.glob(".*"), *root.glob("*/.*"))]


def curve(store: RunStore, id: int) -> list[tuple[Any, ...]]:
    """The losses of a run without what depends on the clock."""
    events = [e for e in store.events(id) if e["kind"] in ("step", "held")]
    return [(e["kind"], e["step"], e.get("loss"), e.get("held_loss")) for e in events]


class Watch:
    """Looks after each kill whether all is as it must be. `home` is the store's; each look opens it anew."""

    def __init__(self, home: Path, reference: list[tuple[Any, ...]] | None = None) -> None:
        self.home, self.reference = home, reference
        self.finished: dict[int, dict[str, str]] = {}

    def look(self) -> None:
        store = RunStore(self.home)
        for id, known in self.finished.items():
            run = store.get(id)
            assert run.status == "done", (id, run.status, run.error)
            assert hashes(run.folder) == known, f"run {id} is not what it was"
        for run in store.list(limit=5):
            if run.id not in self.finished:
                self.look_at(store, run)
        store.close()

    def look_at(self, store: RunStore, run: Run) -> None:
        assert run.folder.is_dir(), f"run {run.id} has no folder"
        steps = [e["step"] for e in store.events(run.id) if e["kind"] == "step"]
        assert steps == list(range(1, len(steps) + 1)), (run.id, steps)
        if run.status == "done" and run.id not in self.finished:
            assert run.adapter is not None and run.step == run.steps, run
            if self.reference is not None:
                assert curve(store, run.id) == self.reference, f"run {run.id} has other losses"
            self.finished[run.id] = hashes(run.folder)


def one_at_a_time(trace: Path) -> int:
    """How many workers there were; none began a run again that another had taken over."""
    seen: dict[str, list[str]] = {}
    for line in trace.read_text().splitlines() if trace.exists() else ():
        run, pid, _ = line.split()
        pids = seen.setdefault(run, [])
        if not pids or pids[-1] != pid:
            assert pid not in pids, f"two processes trained run {run}"
            pids.append(pid)
    return sum(map(len, seen.values()))


def adapter_numbers(folder: Path) -> str:
    """What was learnt, as a text to compare: the stand-in's sum, or the SHA-256 of the weights."""
    weights = folder / "adapter" / "adapter_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else str(adapter_sum(folder))
