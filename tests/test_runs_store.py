"""The run store: migrations, many processes at once, events that grow while they are read, folders, deletion."""

from __future__ import annotations

import json
import os
import shlex
import threading
from pathlib import Path
from typing import Any

import apsw
import pytest

from app.runs import database
from app.runs.database import MIGRATIONS, Database
from app.runs.process import Lock
from app.runs.run import USUAL, RunRequest, command_line, describe, difference, difference_sentence
from app.runs.store import LostRun, RunStore
from lora_core.errors import UserError
from tests.runs_kit import request, spawn


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path)


# ---- migrations
def test_a_new_store_is_at_the_newest_version(store: RunStore) -> None:
    assert store.db.connection.pragma("user_version") == len(MIGRATIONS)
    assert store.db.connection.pragma("journal_mode") == "wal"


def test_a_store_of_version_1_is_brought_up_to_date_with_its_runs(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    run = store.create(request(title="kept"))
    store.close()
    more = (*MIGRATIONS, "ALTER TABLE runs ADD COLUMN colour TEXT", "UPDATE runs SET colour = 'red'")
    db = Database(store.path, more)
    assert db.connection.pragma("user_version") == len(MIGRATIONS) + 2
    assert db.rows("SELECT id, colour FROM runs") == [(run.id, "red")]


def test_the_runs_of_a_first_store_belong_to_the_machines_owner(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    old = Database(tmp_path / "runs" / "runs.sqlite3", MIGRATIONS[:1])
    with old.transaction():
        old.execute("INSERT INTO runs (request, created) VALUES (?, 1.0)", (json.dumps(request().to_dict()),))
    old.close()
    store = RunStore(tmp_path)
    found = store.get(1)
    assert (found.owner, found.shared, found.request) == ("", False, request())


def test_whose_a_run_is_and_who_may_read_it(store: RunStore) -> None:
    mine, theirs = store.create(request(), owner="a"), store.create(request(), owner="b")
    hosts = store.create(request())
    assert (mine.owner, mine.shared, hosts.owner) == ("a", False, "")
    assert [r.id for r in store.list(owner="a")] == [mine.id]
    assert [r.id for r in store.list(owner="")] == [hosts.id]
    assert [r.id for r in store.list(owner="a", shared=True)] == [mine.id]
    assert store.share(theirs.id).shared
    assert [r.id for r in store.list(owner="a", shared=True)] == [theirs.id, mine.id]
    assert [r.id for r in store.list(owner="a", shared=True, status=("done",))] == []
    assert not store.share(theirs.id, False).shared
    assert [r.id for r in store.list()] == [hosts.id, theirs.id, mine.id]


def test_a_migration_that_fails_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.create(request())
    store.close()
    broken = (*MIGRATIONS, "ALTER TABLE runs ADD COLUMN colour TEXT; UPDATE nothing SET x = 1")
    with pytest.raises(apsw.SQLError):
        Database(store.path, broken)
    assert [r.id for r in RunStore(tmp_path).list()] == [1]
    assert "colour" not in str(RunStore(tmp_path).db.rows("SELECT sql FROM sqlite_schema WHERE name = 'runs'"))


def test_a_newer_store_is_refused_in_one_line(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.db.connection.pragma("user_version", len(MIGRATIONS) + 1)
    store.close()
    with pytest.raises(UserError, match="newer LoRA Lab") as caught:
        RunStore(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["another program's", "no database"])
def test_somebody_elses_file_is_refused_and_left_alone(tmp_path: Path, what: str) -> None:
    path = tmp_path / "runs" / "runs.sqlite3"
    path.parent.mkdir()
    if what == "no database":
        path.write_bytes(b"this is a text of some length, and no database at all" * 40)
    else:
        apsw.Connection(str(path)).execute("CREATE TABLE songs (title TEXT)")
    before = path.read_bytes()
    with pytest.raises(UserError, match="another program|damaged or no database"):
        RunStore(tmp_path)
    assert path.read_bytes() == before


def test_processes_that_open_a_new_store_together_all_get_it(tmp_path: Path) -> None:
    code = "import sys; from app.runs.store import RunStore; RunStore(sys.argv[1])"
    processes = [spawn(code, str(tmp_path)) for _ in range(4)]
    for p in processes:
        _, err = p.communicate(timeout=60)
        assert p.returncode == 0, err


# ---- many at once
WRITER = """
import sys
from app.runs.store import RunStore
from tests.runs_kit import request
store = RunStore(sys.argv[1])
for i in range(25):
    run = store.create(request(title=sys.argv[2]))
    claimed = store.claim(run.id)
    assert claimed is not None and claimed.status == "running"
    store.progress(run.id, step=i, steps=25, loss=float(i))
    store.finish(run.id, "done", loss=0.5, adapter=False)
    assert store.get(run.id).request.title == sys.argv[2]
"""


def test_concurrent_writers_in_real_processes(store: RunStore) -> None:
    processes = [spawn(WRITER, str(store.root.parent), f"writer {i}") for i in range(3)]
    stop, errors = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                ids = [r.id for r in store.list(limit=1000)]
                assert ids == sorted(set(ids), reverse=True)
            except BaseException as e:
                errors.append(e)
                return

    threads = [threading.Thread(target=read) for _ in range(3)]
    for t in threads:
        t.start()
    for p in processes:
        _, err = p.communicate(timeout=120)
        assert p.returncode == 0, err
    stop.set()
    for t in threads:
        t.join()
    assert not errors
    runs = store.list(limit=1000)
    assert len(runs) == 75 and {r.status for r in runs} == {"done"}
    assert sorted(int(p.name) for p in store.root.iterdir() if p.name.isdigit()) == sorted(r.id for r in runs)
    assert not list(store.root.glob(".new-*"))


def test_only_one_of_many_processes_claims_a_run(store: RunStore) -> None:
    run = store.create(request())
    code = (
        "import sys; from app.runs.store import RunStore; "
        "print(RunStore(sys.argv[1]).claim(int(sys.argv[2])) is not None)"
    )
    processes = [spawn(code, str(store.root.parent), str(run.id)) for _ in range(4)]
    answers = [p.communicate(timeout=60)[0].strip() for p in processes]
    assert sorted(answers) == ["False", "False", "False", "True"]
    assert store.get(run.id).attempts == 1


def test_a_run_that_was_given_to_another_process_takes_no_more_from_the_first(store: RunStore) -> None:
    run = store.create(request())
    store.claim(run.id)
    store.progress(run.id, step=1)
    with store.db.transaction():
        store.db.execute("UPDATE runs SET process = 'another' WHERE id = ?", (run.id,))
    with pytest.raises(LostRun):
        store.progress(run.id, step=2)
    with pytest.raises(LostRun):
        store.finish(run.id, "done")
    assert (store.get(run.id).step, store.get(run.id).status) == (1, "running")


# ---- what a request may be
@pytest.mark.parametrize(
    "given, said",
    [
        ({"task": None}, "neither given"),
        ({"task": "pirate", "data": "x.txt"}, "both given"),
        ({"test": "x.txt"}, "built-in tasks bring their own"),
        ({"model": ""}, "needs a model"),
        ({"title": "x" * 201}, "201 characters"),
        ({"spec": {"rank": 0}}, "rank is 0"),
        ({"spec": {"rnak": 4}}, "did you mean 'rank'"),
        ({"config": {"lr": float("nan")}}, "finite"),
        ({"config": {"lr": [1]}}, "numbers or words"),
    ],
)
def test_a_wrong_request_is_told_before_anything_is_kept(store: RunStore, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        store.create(RunRequest.from_dict({"model": "m", "task": "pirate"} | given))
    assert store.list() == []


def test_a_request_comes_back_as_it_was(store: RunStore) -> None:
    wanted = request(title='"; DROP TABLE runs; -- \ud800 </script>', spec={"targets": ["q"], "layers": [0, 1, 2]})
    run = store.create(wanted)
    assert store.get(run.id).request == wanted
    assert RunRequest.from_dict(json.loads((run.folder / "request.json").read_text())) == wanted


def test_data_files_are_copied_under_names_of_ours(store: RunStore, tmp_path: Path) -> None:
    data, test = tmp_path / "..;rm -rf ~.TXT", tmp_path / "held.tsv"
    data.write_text("a||b\n")
    test.write_text("x\ty\n")
    run = store.create(RunRequest(model="m", data=str(data), test=str(test)))
    assert sorted(p.name for p in run.folder.iterdir()) == ["data.txt", "request.json", "test.tsv"]
    data.unlink()
    assert (run.folder / "data.txt").read_text() == "a||b\n"
    for wrong in (tmp_path / "no.txt", tmp_path / "x.exe"):
        with pytest.raises(UserError, match="cannot read|no reader"):
            store.create(RunRequest(model="m", data=str(wrong)))
    assert not list(store.root.glob(".new-*")) and len(store.list()) == 1


def test_a_model_folder_is_kept_absolute(store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert store.create(request(model="models/mine")).request.model == str(tmp_path / "models" / "mine")
    assert store.create(request(model="smollm2-135m")).request.model == "smollm2-135m"


# ---- ids, lists, deletion
def test_ids_count_up_and_are_never_given_twice(store: RunStore) -> None:
    first, second = store.create(request()), store.create(request())
    store.delete(second.id)
    third = store.create(request())
    assert (first.id, second.id, third.id) == (1, 2, 3)
    assert third.folder == store.root / "000003" and third.folder.is_dir() and not second.folder.exists()
    assert [r.id for r in store.list()] == [3, 1]
    assert [r.id for r in store.list(limit=1, offset=1)] == [1]


def test_folders_of_a_lost_database_are_not_written_over(store: RunStore) -> None:
    old = [store.create(request(title="old")) for _ in range(3)]
    store.close()
    for path in store.root.glob("runs.sqlite3*"):
        path.unlink()
    fresh = RunStore(store.root.parent)
    run = fresh.create(request(title="new"))
    assert run.id == 4 and fresh.create(request()).id == 5
    assert all("old" in (r.folder / "request.json").read_text() for r in old)


@pytest.mark.parametrize("id", ["1", "../../etc", 1.0, True, -1, None, 2**60])
def test_what_is_no_number_is_no_run(store: RunStore, id: object) -> None:
    store.create(request())
    for use in (store.get, store.events, store.delete, store.folder):
        with pytest.raises(UserError):
            use(id)  # type: ignore[arg-type]


def test_a_run_that_is_trained_is_not_deleted(store: RunStore) -> None:
    run = store.create(request())
    store.claim(run.id)
    with pytest.raises(UserError, match="being trained"):
        store.delete(run.id)
    store.finish(run.id, "done")
    lock = Lock(run.folder)
    assert lock.take()
    with pytest.raises(UserError, match="being trained"):  # its process has not quite ended
        store.delete(run.id)
    lock.release()
    store.delete(run.id)
    with pytest.raises(UserError, match="no run '1'"):
        store.get(run.id)


def test_leftovers_of_killed_processes_are_swept(store: RunStore) -> None:
    for name in (".new-1", ".gone-1"):
        (store.root / name).mkdir()
    run = store.create(request())
    assert store.sweep() == 0
    assert store.sweep(older_s=-1) == 2
    assert run.folder.is_dir() and not list(store.root.glob(".new-*"))


def test_ten_thousand_runs_are_listed_without_reading_their_folders(store: RunStore) -> None:
    text = json.dumps(request().to_dict())
    with store.db.transaction():
        for _ in range(10_000):
            store.db.execute("INSERT INTO runs (request, created, status, adapter) VALUES (?, 1, 'done', 1)", (text,))
    runs = store.list(limit=10_000)
    assert len(runs) == 10_000 and runs[0].adapter == store.root / "010000" / "adapter"


# ---- in words
def test_a_run_in_a_few_words() -> None:
    a, b = request(), request(steps=30, spec={"rank": 4, "layers": [0, 1, 2, 3], "scaling": "alpha/sqrt(r)"})
    assert describe(a) == "q v · r 8"
    assert describe(b) == "q v · r 4 · layers 0–3 · α/√r"
    assert describe(request(spec={"layers": [0, 5]})) == "q v · r 8 · layers 0 5"
    assert {d.name for d in difference(a, b)} == {"rank", "layers", "scaling", "steps"}
    assert difference_sentence(a, request(spec={"rank": 4})) == "r 8 instead of 4"
    assert difference_sentence(a, request()) == "the same settings"


def test_the_command_that_makes_a_run_again() -> None:
    plain = RunRequest(model="my model", data="a b.txt", config={"steps": 60, "lr": 1e-3, "clip": 1.0})
    where, what = "--model 'my model' --data 'a b.txt'", "--targets q,v --rank 8 --alpha 16"
    assert command_line(plain) == f"lora-lab train {where} {what} --steps 60 --lr 0.001 --out DIR"
    special = request(spec={"layers": [0, 1], "dropout": 0.1}, config={"clip": 0.5, "schedule": "cosine"}, title="it's")
    text = command_line(special)
    for part in ("--layers 0,1", "--dropout 0.1", "--clip 0.5", "--schedule cosine", "--seed 0", "it"):
        assert part in text


def test_what_the_command_leaves_out_is_what_the_command_line_takes() -> None:
    import inspect

    from app.commands.train import train

    options = inspect.signature(train).parameters
    assert {k: options[k].default for k in USUAL} == USUAL
    words = request(title="t", spec={"rank": 3}, config={"eval_every": 4, "max_tokens": 99, "batch_size": 2})
    for part in shlex.split(command_line(words))[2::2]:
        assert part.removeprefix("--").replace("-", "_") in options


def test_a_full_disk_is_told_in_one_line(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the disk is full" in str(database.explained(apsw.FullError("database or disk is full"), store.path))
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="the disk is full"):
        store.create(request())
    monkeypatch.undo()
    assert store.list() == [] and not list(store.root.glob(".new-*"))
    assert store.create(request()).id == 1
