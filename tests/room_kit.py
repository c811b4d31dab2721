"""A worker that trains nothing, alone or several at once: `python -m tests.room_kit RUN_FOLDER`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from app.runs import worker
from app.runs.run import RunRequest
from tests.runs_kit import StandIn

STAND_IN = (sys.executable, "-m", "tests.room_kit")


class Part(StandIn):
    """One of several; its loss falls with its rank, so that the wall has something to compare."""

    def __init__(self, request: RunRequest, folder: Path) -> None:
        super().__init__(request, folder)
        self.rank, self.targets = int(request.spec["rank"]), list(request.spec["targets"])

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"trainable": 1000 * self.rank * len(self.targets)}


class StandInSweep:
    """Several at once, a step of each in turn."""

    def __init__(self, requests: Mapping[str, RunRequest], folders: Mapping[str, Path]) -> None:
        self.parts = {n: Part(r, folders[n]) for n, r in requests.items()}

    def part(self, name: str) -> Part:
        return self.parts[name]

    def train(self, stop: Callable[[], bool], leave: Callable[[str], bool]) -> Iterator[tuple[str, dict[str, Any]]]:
        events = {n: p.train(lambda n=n: stop() or leave(n)) for n, p in self.parts.items()}
        while events:
            for name in list(events):
                event = next(events[name], None)
                if event is None:
                    del events[name]
                    continue
                if event["kind"] in ("held", "end"):
                    event["held_loss"] = 3.0 - 0.3 * self.parts[name].rank ** 0.5
                if event["kind"] in ("base", "end"):
                    event["sigma"] = {"layers.0.self_attn.v_proj": [0.0 if event["kind"] == "base" else 1.0 / (i + 1)
                                                                    for i in range(self.parts[name].rank)]}  # fmt: skip
                yield name, event


if __name__ == "__main__":
    sys.exit(worker.main(sys.argv[1:], session=StandIn, open_sweep=StandInSweep))
