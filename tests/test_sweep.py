"""Adapters trained together end where their own runs end."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny import FAMILIES, tiny
from tokenizer_fixture import tiny_tokenizer
from zoo import make

import lora_core as lc
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
