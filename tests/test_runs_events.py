"""Events that grow while they are read: whole lines alone, only what is new, by many readers at once."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from app.runs.events import EventReader, EventWriter, keep, read_all
from app.runs.store import RunStore
from tests.runs_kit import request, spawn


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path)


def test_events_are_read_from_where_one_was(store: RunStore) -> None:
    run = store.create(request())
    assert store.events(run.id) == []
    writer = EventWriter(run.folder / "events.jsonl")
    for i in range(5):
        writer.append({"kind": "step", "step": i, "loss": float("nan") if i == 3 else 1.0})
    assert [e["step"] for e in store.events(run.id)] == [0, 1, 2, 3, 4]
    assert [e["step"] for e in store.events(run.id, since=3)] == [3, 4]
    assert store.events(run.id, since=3)[0]["loss"] is None
    writer.append({"kind": "step", "step": 5})
    assert [e["step"] for e in store.events(run.id, since=5)] == [5]
    assert store.events(run.id, since=6) == []


def test_reading_again_reads_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from app.runs import events

    seen, real = [], events._parse
    monkeypatch.setattr(events, "_parse", lambda data: seen.append(len(data)) or real(data))
    writer, reader = EventWriter(tmp_path / "e"), EventReader()
    for i in range(1000):
        writer.append({"step": i, "loss": 1.5})
    reader.read(tmp_path / "e")
    reader.read(tmp_path / "e")
    writer.append({"step": 1000})
    assert len(reader.read(tmp_path / "e")) == 1001
    assert seen == [os.path.getsize(tmp_path / "e") - 14, 14]


def test_a_torn_last_line_is_ignored_and_then_mended(tmp_path: Path) -> None:
    path = tmp_path / "e"
    path.write_bytes(b'{"step": 0}\nno json\n{"step": 1}\n{"ste')
    reader = EventReader()
    assert [e["step"] for e in reader.read(path)] == [0, 1]
    writer = EventWriter(path)
    writer.append({"step": 2})
    assert [e["step"] for e in reader.read(path)] == [0, 1, 2]
    assert [e["step"] for e in read_all(path)] == [0, 1, 2]
    path.write_bytes(b'{"torn')
    EventWriter(path).append({"step": 9})
    assert path.read_bytes() == b'{"step":9}\n'


def test_a_line_that_is_half_there_is_read_when_it_is_whole(tmp_path: Path) -> None:
    path, reader = tmp_path / "e", EventReader()
    path.write_bytes(b'{"step": 0}\n{"st')
    assert len(reader.read(path)) == 1
    with open(path, "ab") as f:
        f.write(b'ep": 1}\n')
    assert [e["step"] for e in reader.read(path, since=1)] == [1]


def test_a_rewritten_file_is_read_anew(tmp_path: Path) -> None:
    path, reader = tmp_path / "e", EventReader()
    writer = EventWriter(path)
    for i in range(10):
        writer.append({"step": i})
    assert len(reader.read(path)) == 10
    assert len(keep(path, lambda e: e["step"] < 4)) == 4
    writer = EventWriter(path)
    for i in range(20, 40):
        writer.append({"step": i})
    assert [e["step"] for e in reader.read(path)] == [0, 1, 2, 3, *range(20, 40)]


def test_threads_read_while_a_process_writes(store: RunStore) -> None:
    run = store.create(request())
    code = """
import sys; from pathlib import Path; from app.runs.events import EventWriter
w = EventWriter(Path(sys.argv[1]))
for i in range(3000): w.append({"step": i, "norms": {str(k): 0.1 for k in range(30)}})
"""
    process = spawn(code, str(run.folder / "events.jsonl"))
    results: list[list[int]] = [[] for _ in range(4)]

    def follow(mine: list[int]) -> None:
        while len(mine) < 3000:
            mine += [e["step"] for e in store.events(run.id, since=len(mine))]

    threads = [threading.Thread(target=follow, args=(r,), daemon=True) for r in results]
    for t in threads:
        t.start()
    assert process.wait(60) == 0, process.communicate()[1]
    for t in threads:
        t.join(60)
    assert all(r == list(range(3000)) for r in results)
