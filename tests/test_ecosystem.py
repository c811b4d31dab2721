"""At home beside others: a person's own loop, transformers' Trainer, rows from pandas and datasets, frames out."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import bits, filled, ids, tiny

import lora_core as lc
from lora_core.errors import UserError
from lora_core.tasks.records import records

PAIRS = [{"prompt": f"name : Place {i}", "completion": f"Go to Place {i} today, it is good."} for i in range(20)]
LABELS = [{"text": f"number {i}", "label": i % 2} for i in range(20)]


def same_rows(a: lc.Task, b: lc.Task) -> bool:
    return [(r.prompt, r.completion, r.line) for r in (*a.train, *a.test)] == [
        (r.prompt, r.completion, r.line) for r in (*b.train, *b.test)]  # fmt: skip


# ---- models that a person already has


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_persons_own_loop(family: str) -> None:
    model = tiny(family)
    before = bits(model)
    adapter = lc.attach(model, lc.LoraSpec(rank=4, alpha=8), "mine")
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapter.parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x = ids()
    losses = []
    for _ in range(30):
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(v, before[n]) for n, v in bits(model).items()), "the base model is as it was"
    assert float(adapter.delta(next(iter(adapter.sites))).norm()) > 0


def test_inside_transformers_trainer(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = tiny("llama")
    before, x = bits(model), ids(rows=16)
    adapter = lc.attach(model, lc.LoraSpec(rank=4, alpha=8), "mine")
    data = datasets.Dataset.from_dict({"input_ids": x.tolist(), "labels": x.tolist()})
    settings = TrainingArguments(output_dir=str(tmp_path / "run"), max_steps=30, per_device_train_batch_size=8,
                                 learning_rate=1e-2, logging_steps=1, report_to="none", use_cpu=True,
                                 save_strategy="steps", save_steps=30)  # fmt: skip
    trainer = Trainer(model=model, args=settings, train_dataset=data)
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(v, before[n]) for n, v in bits(model).items())
    model.eval()
    with torch.no_grad():
        out = model(x).logits
        adapter.save(tmp_path / "adapter")
        adapter.detach()
        plain = model(x).logits
        lc.load_adapter(model, tmp_path / "adapter")
        assert torch.allclose(model(x).logits, out, atol=1e-6) and not torch.allclose(plain, out, atol=1e-3)


# ---- rows that a person already has


def test_a_list_a_frame_and_a_dataset_are_the_file(tmp_path: Path) -> None:
    for rows in (PAIRS, LABELS):
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        task = lc.load_data(file)
        for data in (rows, tuple(rows), pd.DataFrame(rows), datasets.Dataset.from_list(rows)):
            assert same_rows(lc.load_data(data), task), type(data)
            assert lc.load_data(data).score_name == task.score_name
        held = lc.load_data(rows[:15], test=pd.DataFrame(rows[15:]))
        assert (len(held.train), len(held.test)) == (15, 5)


CELL = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=30).map(
    str.strip).filter(bool)  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(st.lists(st.fixed_dictionaries({"prompt": CELL, "completion": CELL}), min_size=1, max_size=8))
def test_rows_come_through_as_they_are(rows: list[dict[str, str]]) -> None:
    for data in (rows, pd.DataFrame(rows)):
        assert [(r.prompt, r.completion) for r in records(data).rows] == [
            (d["prompt"], d["completion"]) for d in rows]  # fmt: skip


def test_labels_have_their_names_and_other_columns_are_told() -> None:
    features = datasets.Features({"sentence": datasets.Value("string"), "idx": datasets.Value("int32"),
                                  "label": datasets.ClassLabel(names=["negative", "positive"])})  # fmt: skip
    columns = {"sentence": [f"text {i}" for i in range(20)], "idx": [*range(20)], "label": [0, 1] * 10}
    data = datasets.Dataset.from_dict(columns, features)
    task = lc.load_data(data)
    assert lc.labels_of(task) == ("negative", "positive")
    assert task.remarks == ("Dataset: columns not used: idx",)


@pytest.mark.parametrize("data, said", [
    (42, "a pandas DataFrame"),
    ([], "has no rows"),
    ([{"promt": "a", "completion": "b"}], "list, row 1: no prompt"),
    (pd.DataFrame({"text": ["a", "b"], "label": ["x", None]}), "DataFrame, row 2: no label"),
    ([{"prompt": "a", "completion": "b"}, "c"], "list, row 2: a JSON object is needed"),
    (datasets.DatasetDict({"train": datasets.Dataset.from_list(PAIRS)}), "several sets (train)"),
])  # fmt: skip
def test_what_cannot_be_used_is_named(data: Any, said: str) -> None:
    with pytest.raises(UserError) as error:
        lc.load_data(data)
    assert said in str(error.value)


def test_a_column_with_a_gap_keeps_its_whole_numbers() -> None:
    frame = pd.DataFrame({"text": ["a", "b"], "label": [1.0, 0.0]})
    assert [r.completion for r in records(frame).rows] == ["1", "0"]


# ---- results as frames


def test_results_are_frames() -> None:
    adapter = filled(lc.attach(tiny("llama"), lc.LoraSpec(rank=4)))
    spectra = lc.spectra(adapter)
    frame = spectra.to_frame()
    assert list(frame.index) == list(spectra) and frame["norm"].iloc[0] == next(iter(spectra.values())).norm
    assert list(lc.audit(adapter).to_frame()["path"]) == list(adapter.sites)
    stored = lc.stored_result("rank")
    assert stored is not None and len(stored.to_frame()) == len(stored.rows)
    events = [lc.TrainEvent(kind="step", step=i, steps=3, loss=1 / i) for i in (1, 2, 3)]
    assert lc.to_frame(iter(events))["loss"].tolist() == [1, 0.5, 1 / 3]
    losses = {None: lc.Loss(loss=2.0, perplexity=7.4, tokens=3, rows=1)}
    assert lc.to_frame(losses)[["name", "loss"]].iloc[0].tolist() == [None, 2.0]
    assert lc.to_frame(lc.audit(adapter)).equals(lc.audit(adapter).to_frame())
    assert lc.to_frame(spectra).equals(frame)
    for wrong in (3, "text", [3]):
        with pytest.raises(UserError, match="no result"):
            lc.to_frame(wrong)


def test_without_pandas_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *more: Any, **kw: Any) -> Any:
        if name == "pandas":
            raise ImportError
        return real(name, *more, **kw)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match="pip install pandas"):
        lc.to_frame([{"a": 1}])
