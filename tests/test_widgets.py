"""The notebooks' explorers: their values change, the figure follows, and one can compute on them."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_play import MODULE
from tiny import bits, filled, tiny
from tokenizer_fixture import tiny_tokenizer

import lora_core as lc
from app.notebook import Guess, Question, rows_of
from app.playground import PRESETS, Playground, scoped_css
from app.widgets import BudgetExplorer, RankDial, SpectrumExplorer, TrainWidget
from lora_core.errors import UserError
from lora_core.toy import Film, Toy

PAIRS = [{"prompt": f"the fox {i}", "completion": f"jumps over dog {i} and the dog was not amused"} for i in range(20)]


@pytest.fixture
def adapter() -> lc.Adapter:
    return filled(lc.attach(tiny("llama"), lc.LoraSpec(targets=("q", "v", "up"), rank=4, layers=(0, 1)), "mine"))


def y(chart: Any, i: int) -> list[float]:
    return [float(v) for v in chart.data[i].y]


def test_spectrum_explorer_follows_its_controls(adapter: lc.Adapter) -> None:
    w = SpectrumExplorer(adapter)
    assert w.result() == max(lc.spectra(adapter).values(), key=lambda s: s.norm), "it begins with the largest"
    for layer in (0, 1):
        for target in ("q", "v", "up"):
            w.layer.value, w.target.value = layer, target
            s = w.result()
            assert (s.layer, s.target) == (layer, target)
            assert np.allclose(y(w.figure, 1), s.singular_values)
            assert f"{s.energy_90} of 4" in w.say.value
    w._click(None, type("Points", (), {"xs": [0], "ys": ["v"]}), None)
    assert (w.result().layer, w.result().target) == (0, "v")


def test_spectrum_explorer_where_a_layer_lacks_the_matrix() -> None:
    model = tiny("llama")
    spec = lc.LoraSpec(targets=("q", "model.layers.1.mlp.up_proj"), rank=2)
    w = SpectrumExplorer(filled(lc.attach(model, spec)))
    w.layer.value, w.target.value = 0, "up"
    assert (w.result().layer, w.result().target) == (1, "up")


def test_rank_dial_cuts_spectrum_text_and_loss(adapter: lc.Adapter) -> None:
    task, tokenizer = lc.load_data(PAIRS), tiny_tokenizer()
    w = RankDial(adapter, "the fox 1", task, rows=2, tokens=6, tokenizer=tokenizer)
    whole = lc.evaluate(adapter.model, tokenizer, task.test[:2], adapters=[None, "mine"])
    assert w.result().loss == pytest.approx(whole["mine"].loss, rel=1e-6)
    assert w.result().base_loss == pytest.approx(whole[None].loss, rel=1e-6)
    assert w.result().kept_energy == pytest.approx(1)
    kept = lc.audit(adapter).kept_energy
    exact = lc.measure_cuts(adapter, lambda a: lc.CausalLM(a.model, tokenizer, task.template), task.test[:2])
    for k in (2, 1, 0):
        w.rank.value = k
        now = w.result()
        assert now.rank == k and now.kept_energy == pytest.approx(kept[k])
        assert now.loss == pytest.approx(exact.cuts[k]["loss"], rel=1e-5)
        assert sum(v > 0 for v in y(w.spectrum, 1)) == k and f"cut to {k}" in w.texts.value
        assert now.loss in [pytest.approx(v) for v in y(w.losses, 0)]
    assert w.result().text == w.result().base_text and w.result().loss == pytest.approx(w.result().base_loss)
    assert list(adapter.model.__dict__["lora_adapters"].adapters) == ["mine"], "no cut is left on the model"
    with pytest.raises(UserError, match="from 0 to 4"):
        w.at(5)


def test_budget_explorer_follows_its_controls() -> None:
    model = tiny("llama")
    w = BudgetExplorer(model)
    assert w.spec == lc.LoraSpec() and w.result() == lc.budget(model, lc.LoraSpec())
    before = [y(w.memory, i) for i in range(4)]
    w.targets["up"].value, w.rank.value = True, 16
    assert w.result() == lc.budget(model, lc.LoraSpec(targets=("q", "v", "up"), rank=16))
    assert f"{w.result().trainable:,}" in w.say.value and [y(w.memory, i) for i in range(4)] != before
    w.tasks.value = 1
    copies, shared = w.result().storage(1)
    assert f"{shared / copies:.1%}" in w.say.value and shared > copies, "for one task it is more"
    for button in w.targets.values():
        button.value = False
    assert "name at least one matrix" in w.say.value, "nothing chosen is said in words"


def trainer(**more: Any) -> TrainWidget:
    config = lc.TrainConfig(**{"steps": 6, "batch_size": 2, "eval_rows": 2, "lr": 1e-2, **more})
    return TrainWidget(tiny("llama"), lc.LoraSpec(rank=2), lc.load_data(PAIRS), config, tokenizer=tiny_tokenizer())


def test_train_widget_trains_and_draws() -> None:
    w = trainer()
    with pytest.raises(UserError, match="press Train"):
        w.result()
    base = bits(w.model)
    w.train.click()
    done = w.wait()
    assert done.reason == "done" and done.loss is not None and done.base_loss is not None
    assert [e.step for e in done.events if e.kind == "step"] == [1, 2, 3, 4, 5, 6]
    assert len(y(w.figure, 0)) == 6 and w.progress.value == 6 and "step <b>6</b>" in w.say.value
    assert not w.running and not w.train.disabled and w.stop.disabled
    assert all(torch.equal(v, base[n]) for n, v in bits(w.model).items())
    assert len(done.to_frame()) == len(done.events)
    first = w.result().events[-1].loss
    assert w.start().wait().events[-1].loss == first, "Train again begins anew"


def test_train_widget_stops_while_it_trains_and_keeps_the_adapter() -> None:
    w = trainer(steps=100_000, eval_rows=1)
    w.start()
    until = time.monotonic() + 60
    while len([e for e in w.events if e.kind == "step"]) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    w.stop.click()
    done = w.wait()
    assert done.reason == "stopped" and "stopped after step" in w.say.value
    assert float(done.adapter.delta(next(iter(done.adapter.sites))).norm()) > 0


def test_train_widget_says_what_is_wrong() -> None:
    w = TrainWidget(tiny("llama"), lc.LoraSpec(rank=2), lc.load_data(PAIRS), objective="classify",
                    tokenizer=tiny_tokenizer())  # fmt: skip
    with pytest.raises(UserError):
        w.start().wait()
    assert "#b91c1c" in w.say.value and not w.train.disabled


# ---- Play


def test_playground_is_the_pages_modules_and_knows_its_presets() -> None:
    lines = str(Playground._esm).splitlines()
    assert not any(line.startswith("import ") for line in lines)  # a notebook is given one module as text
    theirs = [line for name in ("toy.js", "playground.js")
              for line in MODULE.with_name(name).read_text(encoding="utf-8").splitlines()]  # fmt: skip
    assert [line for line in theirs if not line.endswith('from "./toy.js";')] == lines
    script = """
const {PRESETS} = await import(process.argv[1]);
console.log(JSON.stringify(PRESETS.map(({id, steps, set}) => [id, steps, set])));"""
    done = subprocess.run([*_node(), "--input-type=module", "-e", script, MODULE.as_uri()], capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {i: (steps, set_) for i, steps, set_ in json.loads(done.stdout)} == PRESETS


def _node() -> list[str]:
    from importlib.util import find_spec

    spec = find_spec("playwright")
    binary = Path(spec.origin).parent / "driver" / "node" if spec and spec.origin else Path()
    if not binary.is_file():
        pytest.skip("no node here")
    return [str(binary)]


def test_playground_settings_are_those_that_the_module_reads() -> None:
    script = """
const {read, toyOf} = await import(process.argv[1]);
console.log(JSON.stringify(JSON.parse(process.argv[2]).map((q) => toyOf(read(new URLSearchParams(q)).set))));"""
    plays = [Playground(), Playground("bzero", r=2), Playground("noise", seed=7, alpha=8), Playground("scale", r=16),
             Playground("full", rate=0.1, opt="adam"), Playground("lowrank", alpha="r", rstar=16)]  # fmt: skip
    asked = json.dumps([p.query for p in plays])
    done = subprocess.run([*_node(), "--input-type=module", "-e", script, MODULE.as_uri(), asked], capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for p, js in zip(plays, json.loads(done.stdout)):
        assert {k: js[k] for k in asdict(Toy())} == asdict(p.toy), p.query


def test_playground_can_be_computed_on() -> None:
    p = Playground("bzero", r=2)
    film = p.result()
    assert isinstance(film, Film) and len(film.loss) == 151 and film.A[0].shape == (2, 24)
    p.query = {**p.query, "init": "none", "seed": "5"}  # as a hand on the dials does
    none = p.result()
    assert isinstance(none, Film) and none.loss[-1] == 1.0 and none.toy.seed == 5
    W = Playground("swap", prec="copy").result()
    assert isinstance(W, list) and len(W) == 1001 and (W[0] == W[-1]).all()


@pytest.mark.parametrize("preset, dials, said", [
    ("bzer", {}, "did you mean 'bzero'"), ("first", {"rank": 2}, "no dial 'rank'"),
    ("first", {"r": 17}, "from 1 to 16"), ("first", {"r": 2.5}, "whole number"), ("first", {"t": 500}, "120"),
    ("first", {"init": "C"}, "no value for init"), ("first", {"prec": "bf16"}, "no dial 'prec'"),
])  # fmt: skip
def test_playground_names_what_is_wrong(preset: str, dials: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Playground(preset, **dials)


def test_the_pages_style_stays_within_the_widget() -> None:
    css = scoped_css()
    assert ".ll-lab .ll .pg-chip" in css and "--ll-warm" in css
    for rule in css.replace("@media", "\n@media").split("}"):
        head = rule.split("{")[0].strip() if "@media" not in rule else rule.split("{")[1].strip()
        assert all(s.strip().startswith(".ll-lab") for s in head.split(",") if s.strip()), head


# ---- guesses


def test_a_guess_is_kept_and_locked(capsys: pytest.CaptureFixture[str]) -> None:
    ask = Guess("Which?", "this", "that", right=1)
    ask.pick.value = 0
    ask.reveal()
    assert ask.guessed == 0 and ask.pick.disabled
    with pytest.raises(UserError):
        Guess("Which?", "this")


def test_a_question_answers_with_what_is_stored() -> None:
    ask = Question("rank")
    assert ask.result() is not None and len(ask.answers) == 3
    ask.answer()
    assert rows_of("rank", task="sentiment") and rows_of("no such experiment") == []
