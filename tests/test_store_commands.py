"""Runs as files, room on the disk, long lists, and stores of every version: the run store from the command line."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import pytest

from app import cli
from app.runs.archive import MANIFEST, export_runs, import_runs
from app.runs.database import MIGRATIONS
from app.runs.folder import CHECKPOINT
from app.runs.gc import Asked, collect
from app.runs.process import Lock
from app.runs.queue import settle_dead
from app.runs.rows import Wanted
from app.runs.run import Run, RunRequest
from app.runs.store import RunStore
from app.runs.worker import run_here
from lora_core.errors import UserError
from lora_core.peft_format import WEIGHTS
from lora_core.sealed import before, damaged
from tests.cli_kit import only_json, wrong
from tests.kept_whole import hashes
from tests.runs_kit import StandIn, request

Call = Callable[..., tuple[int, str, str]]


class Peft(StandIn):
    """The stand-in with an adapter in PEFT's format, of one matrix."""

    def save(self, folder: Path, info: Any) -> None:
        import numpy as np
        from safetensors.numpy import save

        name = "base_model.model.model.layers.0.self_attn.q_proj"
        factors = {f"{name}.lora_A.weight": np.ones((2, 4), "f4"), f"{name}.lora_B.weight": np.ones((6, 2), "f4")}
        folder.mkdir()
        (folder / WEIGHTS).write_bytes(save({k: v * self.sum for k, v in factors.items()}))
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_LAB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def store(home: Path) -> RunStore:
    return RunStore(home)


@pytest.fixture
def call(home: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.run([str(w) for w in words])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def done(store: RunStore, **more: Any) -> Run:
    return run_here(store, store.create(request(**{"steps": 6} | more)).id, session=Peft)


# ---- stores of every version
def test_the_first_version_is_brought_up_to_date_with_all_its_runs(home: Path) -> None:
    (home / "runs" / "000005").mkdir(parents=True)
    sql = (Path(__file__).parent / "store_v1.sql").read_text()
    db = apsw.Connection(str(home / "runs" / "runs.sqlite3"))
    db.execute(sql)
    was = {row[0]: row for row in db.execute("SELECT * FROM runs")}
    db.close()
    store = RunStore(home)
    assert store.db.connection.pragma("user_version") == len(MIGRATIONS)
    assert store.db.connection.pragma("integrity_check") == "ok"
    names = [r[1] for r in store.db.rows("PRAGMA table_info(runs)")]
    first = ", ".join(names[: len(was[1])])
    assert {row[0]: row for row in store.db.rows(f"SELECT {first} FROM runs")} == was
    runs = {r.id: r for r in store.list()}
    assert sorted(runs) == [1, 2, 3, 4, 5, 7, 8, 9]
    one = runs[1]
    assert (one.status, one.request.title, one.loss, one.created) == ("done", "the first", 1.5, 1790000000.25)
    assert one.score and one.score["adapted"] == {"BLEU": 41.0} and one.result["trainable"] == 460800
    assert one.adapter == home / "runs" / "000001" / "adapter" and one.owner == "" and not one.shared
    assert runs[2].request.data_name == "my rows.TSV" and runs[2].request.spec["layers"] == [0, 1]
    assert runs[3].request.title == "too fast \ud800 </script>"
    assert runs[4].request.objective is None and runs[4].error == "no model 'no such model'"
    assert [r.id for r in store.waiting()] == [8, 9] and runs[9].position == 2
    assert settle_dead(store) == [] and store.get(7).status == "interrupted"
    assert store.create(request()).id == 13, "numbers are never given twice"
    assert [r.id for r in store.list(text="smollm r8 first done")] == [1] and len(store.list(model="smollm2-135m")) == 7
    assert [r.id for r in store.list(text="the first")] == [1] and [r.id for r in store.list(text="MY rows.tsv")] == [2]


# ---- export and import
def test_a_run_goes_out_and_comes_back_as_it_was(call: Call, store: RunStore, tmp_path: Path) -> None:
    data = tmp_path / "Mina's rows.tsv"
    data.write_text("prompt\tcompletion\na\tb\n")
    first, second = done(store, title="émigré"), done(store, task=None, data=str(data))
    out = tmp_path / "kept.zip"
    status, text, _ = call("runs", "export", first.id, second.id, "--out", out, "--json")
    value = only_json(text)
    assert (status, value["runs"], value["bytes"]) == (0, [1, 2], out.stat().st_size)
    assert str(tmp_path) not in zipfile.ZipFile(out).read("run-2/run.json").decode()  # whose folders these were
    status, text, _ = call("runs", "import", out, "--json")
    assert status == 0 and [r["id"] for r in only_json(text)["runs"]] == [3, 4]
    for old, new in ((first, store.get(3)), (second, store.get(4))):
        for name in ("status", "created", "step", "steps", "loss", "base_loss", "score", "result", "name"):
            if name != "name" or old.request.title:
                assert getattr(new, name) == getattr(old, name), name
        assert store.events(new.id) == store.events(old.id)
        theirs, mine = hashes(old.folder), hashes(new.folder)
        assert mine.pop("request.json") and theirs.pop("request.json") and mine == theirs
        assert new.pid is None and new.owner == ""
    assert (store.get(4).folder / "data.tsv").read_text() == data.read_text()
    assert store.get(4).request.data == "Mina's rows.tsv"
    with pytest.raises(UserError, match="ended already"):
        store.enqueue(3)


def test_what_cannot_be_exported(store: RunStore, call: Call, tmp_path: Path) -> None:
    waiting = store.create(request(), queue=True)
    wrong(call("runs", "export", waiting.id, "--out", tmp_path / "x.zip"), "run 1 is queued; only runs that are over")
    wrong(call("runs", "export", 7, "--out", tmp_path / "x.zip"), "no run '7'")
    (tmp_path / "file").write_text("")
    run = done(store)
    wrong(call("runs", "export", run.id, "--out", tmp_path / "file" / "x.zip"), "a file is in the way")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "home"]


Change = Callable[[dict[str, bytes]], None]


def edit(name: str, change: Callable[[bytes], bytes]) -> Change:
    """Change a file of an archive, and its manifest with it: only what is in the file is wrong then."""

    def do(files: dict[str, bytes]) -> None:
        files[name] = change(files.get(name, b""))
        manifest = json.loads(files[MANIFEST])
        told = {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        manifest["files"][name] = told
        files[MANIFEST] = json.dumps(manifest).encode()

    return do


def told(**values: Any) -> Change:
    return edit("run-1/run.json", lambda data: json.dumps(json.loads(data) | values).encode())


def asked(**values: Any) -> Change:
    def change(data: bytes) -> bytes:
        run = json.loads(data)
        return json.dumps(run | {"request": run["request"] | values}).encode()

    return edit("run-1/run.json", change)


def without(name: str) -> Change:
    def do(files: dict[str, bytes]) -> None:
        del files[name]

    return do


def flip(files: dict[str, bytes]) -> None:
    name = f"run-1/adapter/{WEIGHTS}"
    files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])


BAD: dict[str, tuple[Change, str]] = {
    "a flipped bit": (flip, "SHA-256 is another"),
    "a path upwards": (edit("run-1/../../evil.txt", lambda _: b"x"), "none of its kinds"),
    "an absolute path": (edit("/tmp/evil", lambda _: b"x"), "none of its kinds"),
    "a Windows path": (edit("run-1\\adapter\\x", lambda _: b"x"), "none of its kinds"),
    "a pickle": (edit("run-1/adapter/adapter_model.bin", lambda _: b"x"), "none of its kinds"),
    "a log": (edit("run-1/log.txt", lambda _: b"x"), "none of its kinds"),
    "a checkpoint": (edit(f"run-1/{CHECKPOINT}", lambda _: b"x"), "none of its kinds"),
    "no safetensors": (edit(f"run-1/adapter/{WEIGHTS}", lambda _: b"\x80\x04."), "the adapter of run-1"),
    "a pattern as target": (
        edit("run-1/adapter/adapter_config.json", lambda d: json.dumps({**json.loads(d), "r": "(a+)+$"}).encode()),
        "the adapter of run-1",
    ),
    "no run.json": (without("run-1/run.json"), "manifest does not fit"),
    "another format": (lambda f: f.update({MANIFEST: f[MANIFEST].replace(b'"format": 1', b'"format": 9')}), "format"),
    "no manifest": (without(MANIFEST), "no manifest.json"),
    "a status that is none": (told(status="running"), "status"),
    "NaN": (edit("run-1/run.json", lambda d: d.replace(b'"loss": 1.0', b'"loss": NaN')), "NaN is no number"),
    "a name of ours": (told(pid=1), "pid"),
    "text for a number": (told(step="6"), "step"),
    "a huge number": (told(steps=10**12), "steps"),
    "no such setting": (asked(evil=1), "no setting 'evil'"),
    "no such matrix rank": (asked(spec={"rank": -1}), "rank"),
    "a file that is not there": (asked(task=None, data="../../etc/passwd.txt"), "comes with no data file"),
    "an event that is none": (edit("run-1/events.jsonl", lambda d: d + b'{"kind": "rm"}\n'), "its kind is 'rm'"),
    "a line that is no JSON": (edit("run-1/events.jsonl", lambda d: d + b"[1]\n"), "no JSON object"),
    "norms that are none": (
        edit("run-1/events.jsonl", lambda d: d + b'{"kind": "step", "step": 1, "norms": {"a": "<b>"}}\n'),
        "no numbers by matrix",
    ),
    "deep JSON": (edit("run-1/events.jsonl", lambda d: d + b'{"kind":' + b"[" * 5000 + b"]" * 5000 + b"}\n"), "line"),
    "an adapter that is not told of": (told(adapter=False), "no adapter"),
}


@pytest.mark.parametrize("what", BAD)
def test_an_archive_from_anybody_is_refused_whole(store: RunStore, tmp_path: Path, what: str) -> None:
    change, said = BAD[what]
    good, bad = tmp_path / "good.zip", tmp_path / "bad.zip"
    export_runs(store, [done(store).id], good)
    with zipfile.ZipFile(good) as z:
        files = {n: z.read(n) for n in z.namelist()}
    change(files)
    with zipfile.ZipFile(bad, "w") as z:
        for name, data in files.items():
            z.writestr(zipfile.ZipInfo(name), data)
    with pytest.raises(UserError, match=said) as caught:
        import_runs(store, bad)
    assert "\n" not in str(caught.value) and str(tmp_path) not in str(caught.value)
    assert [r.id for r in store.list()] == [1]
    assert not list(store.root.glob(".new-*")) and not list(tmp_path.rglob("evil*"))
    assert [r.id for r in import_runs(store, good)] == [2], "the good one is still taken"


def test_links_bombs_and_broken_zips_are_refused(store: RunStore, tmp_path: Path) -> None:
    good = tmp_path / "good.zip"
    export_runs(store, [done(store).id], good)
    with zipfile.ZipFile(good) as z:
        files = {n: z.read(n) for n in z.namelist()}

    def refused(said: str) -> None:
        with pytest.raises(UserError, match=said):
            import_runs(store, tmp_path / "bad.zip")
        assert [r.id for r in store.list()] == [1] and not list(store.root.glob(".new-*"))

    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as z:  # the adapter's folder as a link to somewhere else
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16 if name.endswith(".safetensors") else 0
            z.writestr(info, data)
    refused("a link or a folder")
    with zipfile.ZipFile(tmp_path / "bad.zip", "w", zipfile.ZIP_DEFLATED) as z:  # more than its kind may have
        edit("run-1/adapter/lora_lab.json", lambda _: b" " * (5 << 20))(files)
        for name, data in files.items():
            z.writestr(name, data)
    refused("at most 4,194,304 are taken")
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as z:
        with pytest.warns(UserWarning, match="Duplicate"):
            for name in (MANIFEST, MANIFEST):
                z.writestr(name, b"{}")
    refused("twice")
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as z:
        for i in range(9000):
            z.writestr(f"run-{i + 1}/run.json", b"")
    refused("9,000 files")
    whole = good.read_bytes()
    for torn in (whole[:-30], whole[: len(whole) // 2], b"no zip", b"", whole[:200] + b"\xff" * 40 + whole[240:]):
        (tmp_path / "bad.zip").write_bytes(torn)
        refused("no readable archive|is none of its kinds|SHA-256|no archive of runs")
    with pytest.raises(UserError, match="there is no file"):
        import_runs(store, tmp_path / "nowhere.zip")


# ---- room
def test_gc_removes_what_nobody_can_miss_and_no_run(call: Call, store: RunStore, home: Path) -> None:
    over, paused = done(store), run_here(store, store.create(request(config={"press_at": 8})).id, session=Peft)
    live = store.create(request(), queue=True)
    assert paused.status == "interrupted" and (paused.folder / CHECKPOINT).exists()
    dead = 2**22 + 1  # no process has such a number
    kept = (home / "uploads" / "new" / "a.tsv", store.root / "000077" / "events.jsonl", home / ".x.json.1.part")
    stay = [paused.folder / CHECKPOINT, before(live.folder / CHECKPOINT), home / "speed.json", *kept]
    file = over.folder / CHECKPOINT
    go = [file, before(file), damaged(paused.folder / CHECKPOINT), over.folder / f".held.json.{dead}.part",
          over.folder / ".adapter.old", home / f".speed.json.{dead}.tmp", store.root / ".new-1",
          store.root / "000099", home / "uploads" / "old", home / "take" / "run-1-merged.zip"]  # fmt: skip
    for path in [*stay, *go]:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix and path.suffix != ".old":
            path.write_bytes(b"x" * 1000)
        else:
            path.mkdir()
            (path / "request.json").write_bytes(b"x" * 1000)
    for path in go:
        os.utime(path, (1, 1))
    known = hashes(over.folder)
    status, text, _ = call("runs", "gc", "--dry-run", "--json")
    told = only_json(text)
    assert status == 0 and told["dry_run"] and all(p.exists() for p in go)
    assert {r["path"] for r in told["removed"]} == {str(p) for p in go}
    assert told["bytes"] == sum(r["bytes"] for r in told["removed"]) and told["bytes"] >= 9000
    lock = Lock(over.folder)  # its process has not quite ended
    assert lock.take()
    collect(store, Asked())
    assert (over.folder / CHECKPOINT).exists() and not (home / "uploads" / "old").exists()
    lock.release()
    status, text, _ = call("runs", "gc")
    assert status == 0 and "are free again" in text
    assert [p.name for p in go if p.exists()] == [] and all(p.exists() for p in stay)
    assert hashes(over.folder) == known and [r.id for r in store.list()] == [3, 2, 1]
    assert call("runs", "gc")[1] == "nothing to remove\n"


def test_gc_deletes_runs_where_that_is_asked_for_alone(call: Call, store: RunStore) -> None:
    runs = [done(store) for _ in range(4)]
    live = store.create(request(), queue=True)
    with store.db.transaction():
        store.db.execute("UPDATE runs SET ended = ? WHERE id <= 2", (time.time() - 40 * 86_400,))
    call("runs", "gc", "--older-than", 30)
    assert len(store.list()) == 5, "age alone deletes no run"
    wrong(call("runs", "gc", "--runs"), "which runs?")
    wrong(call("runs", "gc", "--keep", 2), "it goes with --runs")
    wrong(call("runs", "gc", "--runs", "--keep", -1), "keep is -1")
    call("runs", "gc", "--runs", "--older-than", 30, "--keep", 3)
    assert [r.id for r in store.list()] == [5, 4, 3, 2] and not runs[0].folder.exists()
    status, text, _ = call("runs", "gc", "--runs", "--keep", 1, "--json")
    assert status == 0 and sorted(r["run"] for r in only_json(text)["removed"]) == [2, 3]
    assert [r.id for r in store.list()] == [5, 4] and store.get(live.id).status == "queued"


# ---- many
@pytest.fixture
def many(home: Path) -> RunStore:
    store = RunStore(home)
    rows = []
    asked = [request(model="a" if i % 2 else "b", spec={"rank": 1 << i % 7}).to_dict() for i in range(14)]
    for i in range(10_000):
        wanted = asked[i % 14] | {"title": f"number {i}" if i % 100 == 0 else None}
        status = ("done", "stopped", "failed", "diverged", "interrupted")[i % 5]
        rows.append((json.dumps(wanted), float(i), status, json.dumps({"train_s": 1.5, "tokens": i})))
    with store.db.transaction():
        for row in rows:
            store.db.execute("INSERT INTO runs (request, created, status, result) VALUES (?, ?, ?, ?)", row)
    return store


def ms(work: Callable[[], Any]) -> float:
    """Milliseconds of processor, the best of three: what else the machine does is not counted."""
    took = []
    for _ in range(3):
        at = time.process_time()
        work()
        took.append(1000 * (time.process_time() - at))
    return min(took)


def test_ten_thousand_runs_are_listed_filtered_and_opened_at_once(many: RunStore, call: Call) -> None:
    assert ms(lambda: many.list()) < 300 and ms(lambda: many.get(5000)) < 300
    assert ms(lambda: many.list(status=("failed",), model="a", text="number 42")) < 300
    assert ms(lambda: call("runs", "list", "--search", "r64", "--json")) < 300
    assert many.list(limit=10_000)[0].id == 10_000 and many.count() == 10_000
    found = many.list(text="NUMBER 4200")
    assert [r.id for r in found] == [4201] and found[0].request.title == "number 4200"
    assert many.count(Wanted(status=("done",), model="b")) == 1000
    assert {r.request.spec["rank"] for r in many.list(text="r64 pirate")} == {64}
    status, text, _ = call("runs", "list", "--status", "done", "--model", "b", "--limit", 3, "--offset", 2, "--json")
    value = only_json(text)
    assert status == 0 and [r["id"] for r in value["runs"]] == [9971, 9961, 9951] and value["total"] == 1000
    assert "3 to 5 of 1,000" in call("runs", "list", "--status", "done", "--model", "b", "--limit", 3, "--offset", 2)[1]
    assert call("runs", "list", "--search", "no such thing")[1] == "no such run\n"


def test_what_a_list_cannot_be_asked_for(call: Call, store: RunStore) -> None:
    wrong(call("runs", "list", "--status", "finished"), "no status 'finished'; possible: queued running done")
    wrong(call("runs", "list", "--limit", 0), "limit is 0")
    wrong(call("runs", "list", "--limit", 10**9), "limit is 1000000000")
    wrong(call("runs", "list", "--offset", -1), "offset is -1")
    wrong(call("runs", "list", "--search", "x" * 201), "201 characters")
    done(store, title="100 % pure_gold")
    for text, count in (("100 % pure_", 1), ("pure%gold", 0), ("\ud800", 0), ("a\0b", 0), ("run 1", 1), ("", 1)):
        assert len(store.list(text=text)) == count, text


def test_a_list_settles_runs_whose_process_is_dead(call: Call, store: RunStore) -> None:
    run = store.create(request())
    store.claim(run.id)
    with store.db.transaction():
        store.db.execute("UPDATE runs SET process = 'gone'")
    status, text, _ = call("runs", "list", "--json")
    assert status == 0 and only_json(text)["runs"][0]["status"] == "interrupted"
    assert RunRequest.from_dict(only_json(text)["runs"][0]["request"]) == run.request
