"""The menu of runs: pages, a search, and how long that takes with ten thousand of them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.pages.past import curve
from app.runs import events
from app.runs.run import RunRequest
from app.runs.store import RunStore
from tests.pages_kit import ask, client

MATRICES = [f"model.layers.{i}.self_attn.{n}" for i in range(30) for n in ("q_proj", "v_proj")]


def real_events(steps: int = 60) -> str:
    """Events as a run of the default model writes them: with norms, and with the singular values of every matrix."""
    lines: list[dict[str, Any]] = [{"kind": "base", "step": 0, "steps": steps, "loss": 3.0, "held_loss": 3.0}]
    for s in range(1, steps + 1):
        line = {"kind": "step", "step": s, "steps": steps, "loss": 3.0 - s / 40, "lr": 1e-3, "norms": {}, "sigma": {}}
        lines.append(line | {"norms": dict.fromkeys(MATRICES, 0.123), "sigma": dict.fromkeys(MATRICES, [0.1234] * 8)})
    lines.append({"kind": "held", "step": steps, "steps": steps, "held_loss": 1.5})
    return "".join(json.dumps(e, separators=(",", ":")) + "\n" for e in lines)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """Ten thousand runs, of which the newest hundred have their events."""
    home = tmp_path_factory.mktemp("home")
    store = RunStore(home, recorded=home / "nothing recorded")
    text = real_events()
    asked = [RunRequest(model="smollm2-135m" if i % 2 else "other", task="pirate",
                        spec={"rank": 1 << i % 7}, config={"steps": 60}).to_dict() for i in range(14)]  # fmt: skip
    with store.db.transaction():
        for i in range(10_000):
            wanted = asked[i % 14] | {"title": f"the {i}th" if i % 50 == 0 else None}
            row = (json.dumps(wanted), "failed" if i % 10 == 0 else "done", float(i), 60, 60, 1.5)
            names = "request, status, created, step, steps, loss"
            store.db.execute(f"INSERT INTO runs ({names}) VALUES (?, ?, ?, ?, ?, ?)", row)
    for id in range(9_901, 10_001):
        store.folder(id).mkdir()
        (store.folder(id) / events.NAME).write_text(text)
    return store


@pytest.fixture(scope="module")
def page(many: RunStore) -> Iterator[TestClient]:
    with client(many) as found:
        yield found


def test_ten_thousand_runs_are_listed_searched_and_opened_at_once(page: TestClient) -> None:
    def took(what: str, **query: Any) -> float:
        """Milliseconds of processor: what else the machine does is not counted."""
        at = time.process_time()
        assert not ask(page, what, **query).get("error")
        return 1000 * (time.process_time() - at)

    took("runs", limit=1)  # what the first question of all imports

    times = {"first": took("runs"), "again": took("runs"), "search": took("runs", text="r64 pirate"),
             "rare": took("runs", text="the 50th"), "last page": took("runs", offset=9_970, limit=30),
             "status": took("runs", status="failed", model="other"), "open": took("run", run=9_950)}  # fmt: skip
    assert all(t < 300 for t in times.values()), times


def test_the_newest_first_then_further_pages_and_what_is_found(page: TestClient) -> None:
    first = ask(page, "runs")
    assert [r["id"] for r in first["runs"]] == list(range(10_000, 9_970, -1)) and first["total"] == 10_000
    assert len(first["runs"][0]["curve"]) == 30 and first["runs"][0]["says"] == "q v · r 8"
    more = ask(page, "runs", offset=30, limit=50)
    assert [r["id"] for r in more["runs"]] == list(range(9_970, 9_920, -1)) and more["offset"] == 30
    found = ask(page, "runs", text="THE 1050th")
    assert [r["id"] for r in found["runs"]] == [1051] and found["total"] == 1 and found["runs"][0]["curve"] == []
    failed = ask(page, "runs", status="failed,queued", model="other")
    assert failed["total"] == 1000 and {r["status"] for r in failed["runs"]} == {"failed"}
    assert ask(page, "runs", text="no such words")["runs"] == []
    for wrong in ({"limit": 0}, {"limit": 101}, {"offset": -1}, {"status": "over"}, {"text": "x" * 201}):
        assert "error" in ask(page, "runs", **wrong), wrong


def test_the_small_curve_is_that_of_the_events(tmp_path: Path) -> None:
    path = tmp_path / events.NAME
    assert curve(path) == []
    path.write_text(real_events(5) + '{"kind":"step","step":6,"loss":null}\n{"kind":"step","step":7,"loss":1.0')
    steps = [e["loss"] for e in events.read_all(path) if e["kind"] == "step" and e["loss"] is not None]
    assert events.losses(path) == steps and len(curve(path)) == 5
    before = curve(path)
    with open(path, "a") as f:
        f.write('}\n{"kind":"step","step":8,"steps":9,"loss":0.5}\n')
    assert len(curve(path)) == 7 and curve(path)[:5] == before
