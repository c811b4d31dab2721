"""Kills of processes that are forked from one that has imported all: power cuts one by one, and the real training."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.runs.archive import export_runs, import_runs
from app.runs.queue import settle_dead
from app.runs.store import RunStore
from app.runs.worker import run_here
from tests.kept_whole import Watch, adapter_numbers, curve, half_written
from tests.power_cut import CUT, Lose, PowerCut
from tests.runs_kit import StandIn, request

Figures = dict[str, Any]


# ---- the power goes
def forked(work: Callable[[], object]) -> int:
    """Do something in a process of its own that begins as this one; its exit status (negative: the signal)."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)


def cuts(home: Path, scenario: Callable[[Path], object], check: Callable[[Path], object], *, root: Path, every: int = 1,
         first: int = 1, lose: Lose = "nothing", end: float = float("inf")) -> int:  # fmt: skip
    """Cut the power at operation `first`, `first` + `every`, … of a scenario until it is over; how many cuts it took.

    scenario is done in a forked process, check in another one after each cut.
    """
    at = first
    while time.monotonic() < end:
        code = forked(lambda at=at: (PowerCut(root, at, lose).arm(), scenario(home)))
        assert code in (0, CUT), f"cut {at} ({lose}): the scenario ended with status {code}"
        assert forked(lambda: check(home)) == 0, f"after cut {at} ({lose})"
        if code == 0:
            break
        at += every
    return (at - first) // every


def train_cuts(home: Path, every: int, first: int, lose: Lose, session: Any, wanted: Any, end: float) -> int:
    """Cuts all through a training; after each the same run goes on to its end, in a process that is not cut."""
    reference = home / "reference.json"
    watch = Watch(home)

    def whole() -> None:
        store = RunStore(home)
        run = run_here(store, store.create(wanted).id, session=session)
        assert run.status == "done", run.error
        values = [curve(store, run.id), run.loss, run.base_loss, adapter_numbers(run.folder)]
        reference.write_text(json.dumps(values))

    def scenario(_: Path) -> None:
        store = RunStore(home)
        run_here(store, store.list(1)[0].id, session=session)

    def check(_: Path) -> None:
        store = RunStore(home)
        run = store.list(1)[0]
        settle_dead(store)
        if run.status != "done" and store.get(run.id).status != "done":
            run_here(store, run.id, session=session)
        run = store.get(run.id)
        assert run.status == "done", (run.status, run.error)
        got = json.loads(json.dumps([curve(store, run.id), run.loss, run.base_loss, adapter_numbers(run.folder)]))
        assert got == json.loads(reference.read_text()), f"run {run.id} is another than without the cut"
        store.sweep(older_s=-1)
        assert not (left := half_written(store.root)), left
        store.create(wanted)

    assert forked(whole) == 0
    assert forked(lambda: RunStore(home).create(wanted)) == 0
    done = cuts(home, scenario, check, root=home / "runs", every=every, first=first, lose=lose, end=end)
    assert forked(watch.look) == 0
    return done


def power(home: Path, times: int, seconds: float, dice: random.Random) -> Figures:
    """Cuts in a stand-in's training and in what the store does by itself; `times`: about how many at most."""
    end, figures = time.monotonic() + seconds, {}
    every = max(1, round(3 * 90 / times))
    for lose in ("nothing", "data", "names"):
        here = home / lose
        here.mkdir()
        wanted = request(steps=12, config={"size": 3000, "checkpoint_every": 5})
        figures[f"training, {lose} lost"] = train_cuts(here, every, dice.randint(1, every), lose, StandIn, wanted, end)
        figures |= {f"{name}, {lose} lost": n for name, n in store_cuts(here, every, lose).items()}
    return {"kills": sum(figures.values()), **figures}


def store_cuts(home: Path, every: int, lose: Lose) -> dict[str, int]:
    """Cuts in making, importing and deleting a run: it is there whole, or not at all."""
    archive = home / "kept.zip"

    def keep() -> None:
        store = RunStore(home)
        failed = run_here(store, store.create(request(config={"fail_at": 4})).id, session=StandIn)
        export_runs(store, [failed.id], archive)

    def take(_: Path) -> None:
        import_runs(RunStore(home), archive)

    def make(_: Path) -> None:
        RunStore(home).create(request(title="cut"))

    def delete(_: Path) -> None:
        store = RunStore(home)
        store.delete(store.list(1)[0].id)

    def check(_: Path) -> None:
        store = RunStore(home)
        for run in store.list(1000):
            assert json.loads((run.folder / "request.json").read_text()) == run.request.to_dict()
        folders = {p.name for p in store.root.iterdir() if p.name.isdigit()}
        store.sweep(older_s=-1)
        assert not half_written(store.root)
        assert {f"{r.id:06d}" for r in store.list(1000)} <= folders
        make(home)

    few = max(1, every // 3)
    assert forked(keep) == 0
    return {
        "making": cuts(home, make, check, root=home / "runs", every=few, lose=lose),
        "importing": cuts(home, take, check, root=home / "runs", every=few, lose=lose),
        "deleting": cuts(home, delete, check, root=home / "runs", every=few, lose=lose),
    }


# ---- the library's own training
def real(home: Path, times: int, seconds: float, dice: random.Random) -> Figures:
    """A tiny model trained by the library, in processes forked from one that has torch already."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    import torch

    import lora_core as lc
    from app.runs.session import open_session
    from tests.runs_kit import tiny_model

    torch.set_num_threads(1)
    model = str(tiny_model(home / "model"))
    lc.load_model(model, dtype="float32")  # imports what a training needs
    fixed = {"batch_size": 4, "lr": 0.02, "seed": 3, "eval_rows": 8, "dtype": "float32", "device": "cpu"}
    wanted = request(model=model, steps=30, spec={"rank": 4}, config={**fixed, "checkpoint_every": 5})
    over, killed, finished = time.monotonic() + seconds, 0, 0
    end = time.monotonic() + 0.6 * seconds  # of the kills; the cuts have the rest
    kills_home, cuts_home = home / "kills", home / "cuts"

    def whole() -> None:
        store = RunStore(kills_home)
        run = run_here(store, store.create(wanted).id, session=open_session)
        assert run.status == "done", run.error
        (home / "reference").write_text(json.dumps([curve(store, run.id), run.loss, adapter_numbers(run.folder)]))

    began = time.monotonic()
    assert forked(whole) == 0
    one = time.monotonic() - began
    reference = json.loads((home / "reference").read_text())
    while killed < times // 2 and time.monotonic() < end:
        assert forked(lambda: RunStore(kills_home).create(wanted)) == 0
        while True:
            pid = os.fork()
            if not pid:
                try:
                    store = RunStore(kills_home)
                    run_here(store, store.list(1)[0].id, session=open_session)
                finally:
                    os._exit(0)
            time.sleep(dice.uniform(0.2, 1.0) * one)
            done, _ = os.waitpid(pid, os.WNOHANG)
            if not done:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                killed += 1
            store = RunStore(kills_home)
            settle_dead(store)
            run = store.list(1)[0]
            assert run.status in ("done", "interrupted", "queued"), run.error
            if run.status == "done":
                got = [curve(store, run.id), run.loss, adapter_numbers(run.folder)]
                assert json.loads(json.dumps(got)) == reference, f"run {run.id} has other losses"
                finished += 1
            store.close()
            if run.status == "done" or killed >= times or time.monotonic() > end:
                break
    cuts_home.mkdir()
    every = max(1, round(80 / max(1, times // 2)))
    made = train_cuts(cuts_home, every, dice.randint(1, every), "data", open_session, wanted, over)
    return {"kills": killed + made, "killed": killed, "cuts": made, "finished": finished + made + 1}
