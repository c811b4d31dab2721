"""A real encoder learns real labels in half a minute: MiniLM on movie reviews (SST-2)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import lora_core as lc
from lora_core.evaluate import spread

DATA = Path(os.environ.get("LORA_LAB_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.mark.skipif(not (DATA / "sst2_train.tsv").exists(), reason=f"no sst2_train.tsv in {DATA}")
def test_minilm_learns_the_sentiment_of_reviews() -> None:
    words = {"0": "negative", "1": "positive"}
    task = lc.load_data(DATA / "sst2_train.tsv", test=DATA / "sst2_dev.tsv", labels=words)
    try:
        model, tokenizer = lc.load_model("minilm", device="cpu", dtype="float32", labels=lc.labels_of(task))
    except lc.UserError as error:
        pytest.skip(str(error))
    adapter = lc.attach(model, lc.LoraSpec(targets=("q", "v"), rank=8, full=("head",)))
    config = lc.TrainConfig(steps=80, batch_size=16, lr=3e-3, max_tokens=64, eval_rows=0)
    *_, end = lc.train(adapter, task, config)
    assert end.reason == "done" and end.held_loss is None
    objective = lc.Classification(model, tokenizer)
    found = lc.measure(objective, spread(task.test, 200), adapters=[None, adapter.name])
    print({name: figures["accuracy"] for name, figures in found.items()}, f"{end.train_s:.1f} s")
    assert found[None]["accuracy"] < 0.65, "a random head guesses"
    assert found[adapter.name]["accuracy"] > 0.75
    said = objective.predict(["a gripping and beautiful film", "dull , clumsy and far too long"])
    assert [label for label, _ in said] == ["positive", "negative"]
