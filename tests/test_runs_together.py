"""Several runs in one process: each ends as it would alone, and is a run like any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.runs.process import STOP
from app.runs.queue import settle_dead
from app.runs.run import Run, RunRequest
from app.runs.store import RunStore
from app.runs.together import bind, train
from app.runs.worker import TOGETHER, run_here
from lora_core.errors import UserError
from tests.runs_kit import spawn, tiny_model, until

CONFIG = {"steps": 4, "batch_size": 2, "eval_rows": 4, "seed": 0, "max_tokens": 48}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path)


def make(store: RunStore, model: str, rank: int, targets: tuple[str, ...] = ("q", "v"), **config: object) -> Run:
    spec = {"targets": list(targets), "rank": rank, "alpha": 2.0 * rank}
    return store.create(RunRequest(model=model, task="sentiment", spec=spec, config={**CONFIG, **config}))


def test_each_ends_as_alone_with_its_own_film_and_adapter(store: RunStore, model: str) -> None:
    shapes = [(1, ("q", "v")), (8, ("q", "v")), (2, ("q", "k", "v", "o", "down"))]
    alone = [run_here(store, make(store, model, *s).id) for s in shapes]
    runs = [make(store, model, *s) for s in shapes]
    first = bind(store, runs)
    assert [r.id for r in store.waiting()] == [first.id]  # the others wait for nobody
    train(store, first.folder)
    for mine, other in zip([store.get(r.id) for r in runs], alone, strict=True):
        assert mine.status == other.status == "done" and mine.step == 4
        assert mine.base_loss == pytest.approx(other.base_loss, rel=1e-5)
        assert mine.loss == pytest.approx(other.loss, rel=1e-4)
        assert mine.result["trainable"] == other.result["trainable"] and mine.adapter is not None
        curve, theirs = ([e["loss"] for e in store.events(r.id) if e["kind"] == "step"] for r in (mine, other))
        assert curve == pytest.approx(theirs, rel=1e-3)
        films = [[set(e["sigma"]) for e in store.events(r.id) if e.get("sigma")][-1] for r in (mine, other)]
        assert films[0] == films[1]
    assert store.get(runs[1].id).loss != store.get(runs[0].id).loss


def test_one_leaves_and_one_was_cancelled_before(store: RunStore, model: str) -> None:
    runs = [make(store, model, r, steps=6) for r in (1, 2, 4)]
    first = bind(store, runs)
    store.ask_to_stop(runs[2].id)  # it waits: it is taken out
    from app.runs import together

    class Leaving(together.RealSweep):
        def train(self, stop, leave):  # type: ignore[no-untyped-def]
            for name, event in super().train(stop, leave):
                if event["kind"] == "step" and event["step"] == 2:
                    (runs[1].folder / STOP).touch()
                yield name, event

    train(store, first.folder, Leaving)
    a, b, c = (store.get(r.id) for r in runs)
    assert (a.status, a.step) == ("done", 6)
    assert (b.status, b.step) == ("stopped", 2) and b.adapter is not None and b.loss is not None
    assert (c.status, c.attempts) == ("stopped", 0)


def test_what_cannot_share_a_batch_is_told(store: RunStore, model: str) -> None:
    with pytest.raises(UserError, match="cannot share batches"):
        bind(store, [make(store, model, 1), make(store, model, 2, seed=1)])
    run = make(store, model, 1)
    store.ask_to_stop(run.id)
    (run.folder / TOGETHER).write_text(f"[{run.id}]")
    with pytest.raises(UserError, match="waits for nobody"):
        train(store, run.folder)


def test_a_model_that_is_not_there_fails_all_of_them(store: RunStore) -> None:
    runs = [make(store, "/nowhere/at/all", r) for r in (1, 2)]
    train(store, bind(store, runs).folder)
    found = [store.get(r.id) for r in runs]
    assert [r.status for r in found] == ["failed"] * 2 and all("nowhere" in str(r.error) for r in found)


def killed(store: RunStore, runs: list[Run]) -> None:
    """Train runs together until a checkpoint is there, and kill the process."""
    first = bind(store, runs)
    process = spawn(f"from app.runs import worker; worker.main([{str(first.folder)!r}])")
    until(lambda: all(store.get(r.id).step > 25 for r in runs))
    process.kill()
    process.wait()
    settle_dead(store)
    assert [store.get(r.id).status for r in runs] == ["interrupted"] * len(runs)


def test_a_killed_batch_goes_on_together_from_its_checkpoints(store: RunStore, model: str) -> None:
    runs = [make(store, model, r, steps=300) for r in (1, 2)]
    whole = [make(store, model, r, steps=300) for r in (1, 2)]
    train(store, bind(store, whole).folder)
    killed(store, runs)
    starts: list[int] = []
    from app.runs import together

    class Watched(together.RealSweep):
        def train(self, stop, leave):  # type: ignore[no-untyped-def]
            for name, event in super().train(stop, leave):
                starts.extend([event["step"]] * (event["kind"] == "base"))
                yield name, event

    first = bind(store, [store.get(r.id) for r in runs])
    bind(store, [store.get(runs[1].id)])  # as a room does: all of them wait again
    train(store, first.folder, Watched)
    assert all(s and s % 10 == 0 for s in starts) and len(starts) == 2
    for mine, other in zip(runs, whole, strict=True):
        a, b = store.get(mine.id), store.get(other.id)
        assert (a.status, a.step, a.attempts) == ("done", 300, 2)
        ours, theirs = ({e["step"]: e["loss"] for e in store.events(r.id) if e["kind"] == "step"} for r in (a, b))
        # Bit for bit; but where the kill came between two checkpoints some steps were made with fewer beside them.
        assert ours == theirs if starts[0] == starts[1] else ours == pytest.approx(theirs, rel=1e-3)


def test_a_killed_batch_can_go_on_one_by_one(store: RunStore, model: str) -> None:
    runs = [make(store, model, r, steps=300) for r in (1, 2)]
    killed(store, runs)
    (runs[1].folder / STOP).touch()
    again = run_here(store, runs[1].id)  # the file was for the attempt before
    assert again.status == "done" and again.step == 300
    steps = [e["step"] for e in store.events(again.id) if e["kind"] == "step"]
    assert steps == list(range(1, 301))
