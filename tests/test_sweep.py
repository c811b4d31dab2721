"""Adapters trained together end where their own runs end."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, tiny
from tokenizer_fixture import tiny_tokenizer
from zoo import make

import lora_core as lc
from lora_core.sealed import before
from lora_core.tasks import Row, Task

ROWS = tuple(Row(f"name: place {i} {'x' * (i % 5)}", f"it is a {'very ' * (i % 3)}quiet place {i}") for i in range(20))
TASK = Task(name="t", about="", train=ROWS, test=ROWS[:4], score_name="", scorer=lambda *_: {})
SPECS = {
    "r1": lc.LoraSpec(targets=("q", "v"), rank=1),
    "r4": lc.LoraSpec(targets=("q", "v"), rank=4, alpha=4),
    "all": lc.LoraSpec(targets=("q", "k", "v", "o", "down"), rank=2, mask=0.1),
    "pissa": lc.LoraSpec(targets=("v",), rank=2, init="pissa"),
    "gradient": lc.LoraSpec(targets=("o",), rank=2, init="gradient"),
}
CONFIG = lc.TrainConfig(steps=4, batch_size=3, lr=3e-3, accumulate=2, eval_every=2, schedule="cosine")


def alone(model: Any, name: str, spec: lc.LoraSpec, config: lc.TrainConfig, **more: Any) -> tuple[Any, list[Any]]:
    a = lc.attach(model, spec, name, seed=config.seed)
    events = list(lc.train(a, TASK if "task" not in more else more.pop("task"), config, **more))
    deltas = {k: d.dense() for k, d in a.deltas().items()}
    a.detach()
    return deltas, events


@pytest.mark.parametrize("family", FAMILIES)
def test_together_is_as_alone(family: str) -> None:
    model = tiny(family, dtype=torch.float64)
    want = {n: alone(model, n, s, CONFIG, tokenizer=tiny_tokenizer()) for n, s in SPECS.items()}
    got: dict[str, list[Any]] = {n: [] for n in SPECS}
    for e in lc.sweep(model, SPECS, TASK, CONFIG, tokenizer=tiny_tokenizer()):
        got[e.name].append(e.event)
    for name, (deltas, events) in want.items():
        mine = lc.get_adapter(model, name)
        assert not mine.on
        for k, d in mine.deltas().items():
            torch.testing.assert_close(d.dense(), deltas[k], rtol=1e-6, atol=1e-9)
        theirs = [(e.kind, e.step, e.loss, e.held_loss) for e in events]
        ours = [(e.kind, e.step, e.loss, e.held_loss) for e in got[name]]
        assert [o[:2] for o in ours] == [t[:2] for t in theirs], name
        for o, t in zip(ours, theirs, strict=True):
            for mine_, theirs_ in zip(o[2:], t[2:], strict=True):
                assert mine_ == (theirs_ and pytest.approx(theirs_, rel=1e-6)), (name, o, t)
        assert got[name][-1].reason == "done" and got[name][-1].tokens == events[-1].tokens


def test_classifiers_with_their_heads() -> None:
    labelled = tuple(dataclasses.replace(r, completion="ab"[i % 2]) for i, r in enumerate(ROWS))
    task = dataclasses.replace(TASK, train=labelled, test=labelled[:4])
    model = make("bert")
    model.resize_token_embeddings(400)
    specs = {f"r{r}": lc.LoraSpec(targets=("q", "v"), rank=r, full=("head",)) for r in (1, 3)}
    tokenizer = tiny_tokenizer()
    more = {"tokenizer": tokenizer, "task": task, "objective": "classify"}
    want = {n: alone(model, n, s, CONFIG, **more) for n, s in specs.items()}
    last = {}
    for e in lc.sweep(model, specs, task, CONFIG, tokenizer=tokenizer, objective="classify"):
        last[e.name] = e.event
    for name, (deltas, events) in want.items():
        assert last[name].held_loss == pytest.approx(events[-1].held_loss, rel=1e-6)
        for k, d in lc.get_adapter(model, name).deltas().items():
            torch.testing.assert_close(d.dense(), deltas[k], rtol=1e-6, atol=1e-9)


def test_one_that_diverges_leaves_the_others_alone() -> None:
    model = tiny("llama", dtype=torch.float64)
    specs = {"wild": lc.LoraSpec(rank=2, alpha=1e300), "calm": lc.LoraSpec(rank=2)}
    ends = {e.name: e.event for e in lc.sweep(model, specs, TASK, lc.TrainConfig(steps=5, batch_size=3, lr=0.1),
                                              tokenizer=tiny_tokenizer()) if e.event.kind == "end"}  # fmt: skip
    assert ends["wild"].reason == "diverged" and "the adapter of step" in (ends["wild"].message or "")
    assert ends["calm"].reason == "done" and (ends["calm"].held_loss or 0) > 0


def test_stop_keeps_what_there_is() -> None:
    model = tiny("llama")
    events = list(lc.sweep(model, {"a": lc.LoraSpec(rank=2), "b": lc.LoraSpec(rank=1)}, TASK, CONFIG,
                           tokenizer=tiny_tokenizer(), stop=lambda: True))  # fmt: skip
    ends = [e.event for e in events if e.event.kind == "end"]
    assert [e.reason for e in ends] == ["stopped", "stopped"] and all(e.step == 1 and e.held_loss for e in ends)


@pytest.mark.parametrize(
    ("specs", "says"),
    [({}, "no settings"), ({"a": lc.LoraSpec(dropout=0.1)}, "a has dropout"), ({"a b": lc.LoraSpec()}, "cannot name")],
)
def test_what_cannot_be_swept(specs: dict[str, lc.LoraSpec], says: str) -> None:
    with pytest.raises(lc.UserError, match=says):
        list(lc.sweep(tiny("llama"), specs, TASK, CONFIG, tokenizer=tiny_tokenizer()))


def test_one_adapter_leaves_and_the_others_go_on() -> None:
    model = tiny(FAMILIES[0], dtype=torch.float64)
    specs = {n: SPECS[n] for n in ("r1", "r4")}
    seen: list[Any] = []
    gone: list[str] = []

    def leave(name: str) -> bool:
        gone.append(name)
        return name == "r1" and sum(e.name == "r1" and e.event.kind == "step" for e in seen) == 2

    for e in lc.sweep(model, specs, TASK, CONFIG, tokenizer=tiny_tokenizer(), leave=leave):
        seen.append(e)
    ends = {e.name: e.event for e in seen if e.event.kind == "end"}
    assert (ends["r1"].reason, ends["r1"].step) == ("stopped", 2) and ends["r1"].held_loss is not None
    assert (ends["r4"].reason, ends["r4"].step) == ("done", 4) and gone.count("r1") == 2
    _, events = alone(tiny(FAMILIES[0], dtype=torch.float64), "r4", SPECS["r4"], CONFIG, tokenizer=tiny_tokenizer())
    assert ends["r4"].held_loss == pytest.approx(events[-1].held_loss, rel=1e-6)  # as if it had been alone


# ---- after a kill
SAVED = dataclasses.replace(CONFIG, steps=7, checkpoint_every=2)


def swept(files: dict[str, Path], until: int = 0, config: lc.TrainConfig = SAVED) -> tuple[dict[str, Any], Any]:
    """({name: its events}, the model), as far as the first event of step `until`: then it is killed."""
    model = tiny("llama")
    got: dict[str, list[Any]] = {n: [] for n in SPECS}
    for e in lc.sweep(model, SPECS, TASK, config, tokenizer=tiny_tokenizer(), checkpoints=files):
        if until and e.event.step == until:
            break
        got[e.name].append(e.event)
    return got, model


def same(model: Any, other: Any, names: Any = SPECS, **close: Any) -> None:
    for name in names:
        mine, theirs = (dict(lc.get_adapter(m, name).named_parameters()) for m in (model, other))
        for k, p in mine.items():
            torch.testing.assert_close(p, theirs[k], **(close or {"rtol": 0, "atol": 0}))


def test_killed_it_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    files = {n: tmp_path / n for n in SPECS}
    whole, model = swept({})
    swept(files, until=6)  # the checkpoints of step 4 are there
    assert all(f.exists() for f in files.values())
    rest, other = swept(files)
    for name in SPECS:
        assert rest[name][0].kind == "base" and rest[name][0].step == 4
        assert rest[name][0].loss == whole[name][0].loss, "what the base was is not measured again"
        want = [(e.kind, e.step, e.loss, e.held_loss, e.tokens) for e in whole[name] if e.step > 4]
        assert [(e.kind, e.step, e.loss, e.held_loss, e.tokens) for e in rest[name][1:]] == want
        assert not files[name].exists() and not before(files[name]).exists(), "done runs leave no checkpoint"
    same(model, other)


def test_checkpoints_of_different_steps_wait_for_each_other(tmp_path: Path) -> None:
    files = {n: tmp_path / n for n in SPECS}
    whole, model = swept({})
    swept(files, until=6)
    os.replace(before(files["r4"]), files["r4"])  # killed between two writes
    for f in ("pissa", "gradient"):
        files[f].unlink()
        before(files[f]).unlink()  # or before any
    rest, other = swept(files)
    assert {n: (e[0].step, e[1].step) for n, e in rest.items()} == {
        "r1": (4, 5), "r4": (2, 3), "all": (4, 5), "pissa": (0, 1), "gradient": (0, 1)}  # fmt: skip
    for name in SPECS:
        curve = {e.step: e.loss for e in whole[name] if e.kind == "step"}
        assert all(e.loss == pytest.approx(curve[e.step], rel=1e-4) for e in rest[name] if e.kind == "step")
    same(model, other, rtol=1e-3, atol=1e-5)


def test_what_one_has_written_the_other_goes_on_from(tmp_path: Path) -> None:
    files = {n: tmp_path / n for n in SPECS}
    whole, model = swept({})
    swept(files, until=6)
    alone_, m = [], tiny("llama")
    a = lc.attach(m, SPECS["all"], "all", seed=SAVED.seed)
    for e in lc.train(a, TASK, SAVED, tokenizer=tiny_tokenizer(), checkpoint=files["all"]):
        alone_.append(e)
    assert (alone_[0].step, alone_[1].step, alone_[-1].reason) == (4, 5, "done")
    same(model, m, ["all"], rtol=1e-3, atol=1e-5)
    asked = [0]

    def stop() -> bool:
        asked[0] += 1
        return asked[0] == 3

    m = tiny("llama")
    for _ in lc.train(lc.attach(m, SPECS["r4"], "r4"), TASK, SAVED, tokenizer=tiny_tokenizer(), stop=stop,
                      checkpoint=tmp_path / "one"):  # fmt: skip
        pass
    rest, other = swept({"r4": tmp_path / "one"})
    assert (rest["r4"][0].step, rest["r4"][1].step, rest["r1"][1].step) == (3, 4, 1)
    same(model, other, rtol=1e-3, atol=1e-5)


def test_stopped_it_can_go_on_from_that_very_step(tmp_path: Path) -> None:
    model, seen = tiny("llama"), []
    for e in lc.sweep(model, {"r4": SPECS["r4"]}, TASK, SAVED, tokenizer=tiny_tokenizer(),
                      stop=lambda: len([e for e in seen if e.event.kind == "step"]) == 3,
                      checkpoints={"r4": tmp_path / "r4"}):  # fmt: skip
        seen.append(e)
    assert (seen[-1].event.reason, seen[-1].event.step) == ("stopped", 3)
    rest, _ = swept({"r4": tmp_path / "r4"})
    assert (rest["r4"][0].step, rest["r4"][1].step) == (3, 4)
