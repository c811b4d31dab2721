"""The laws with real weights: SmolLM2-135M, a language model of bfloat16's origin, and MiniLM, a bare encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny import bits, filled

import lora_core as lc

Out = Callable[[Any], torch.Tensor]
TEXTS = ["The Copper Kettle is a pub near the river.", "An adapter is small, and the matrix it changes is not."]
TARGETS = ("q", "v", "o", "down")
EVERY = {"smollm2-135m": "q k v o gate up down".split(), "minilm": "q k v o up down".split()}


@pytest.fixture(scope="module", params=["smollm2-135m", "minilm"])
def loaded(request: pytest.FixtureRequest) -> Iterator[tuple[Any, dict[str, torch.Tensor]]]:
    """(model in float32, its inputs: two rows of one length)"""
    model, tokenizer = lc.load_model(request.param, device="cpu", dtype="float32")
    x = tokenizer(TEXTS, return_tensors="pt", truncation=True, max_length=9)
    yield model, {"input_ids": x["input_ids"], "attention_mask": x["attention_mask"]}


@pytest.fixture
def real(loaded: tuple[Any, dict[str, torch.Tensor]]) -> Iterator[tuple[Any, Out]]:
    """(model, what it computes); whatever a test attached is taken off again."""
    model, x = loaded

    def out(m: Any) -> torch.Tensor:
        with torch.no_grad():
            y = m(**x)
        return y.logits if "logits" in y else y.last_hidden_state

    yield model, out
    for a in list(model.__dict__["lora_adapters"].adapters.values()) if "lora_adapters" in model.__dict__ else []:
        a.detach()


def spec(model: Any, **more: Any) -> lc.LoraSpec:
    return lc.LoraSpec(**{"targets": TARGETS, "rank": 8, "alpha": 16, **more})


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """How far apart, relative to the size."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def test_the_matrices_are_all_there(real: tuple[Any, Out]) -> None:
    model, _ = real
    name = model.lora_lab.name
    sites = lc.find_sites(model)
    assert list(dict.fromkeys(s.target for s in sites)) == EVERY[name]
    assert len(sites) == {"smollm2-135m": 30 * 7, "minilm": 6 * 6}[name]
    expected = {"smollm2-135m": 30 * 8 * (576 + 576 + 576 + 192), "minilm": 6 * 8 * 4 * 384}[name]
    assert lc.budget(model, lc.LoraSpec(targets=("q", "v"), rank=8)).trainable == expected


def test_attach_merge_unmerge_detach(real: tuple[Any, Out]) -> None:
    model, out = real
    base, weights = out(model), bits(model)
    adapter = lc.attach(model, spec(model))
    assert torch.equal(out(model), base), "bit-identical at first"
    filled(adapter, std=0.02)
    changed = out(model)
    assert off(changed, base) > 1e-3
    adapter.merge()
    assert not torch.equal(out(model), changed) and off(out(model), changed) < 1e-5
    adapter.unmerge()
    assert torch.equal(out(model), changed)
    assert all(torch.equal(v, weights[n]) for n, v in bits(model).items())
    adapter.merge()
    adapter.detach()
    assert all(torch.equal(v, weights[n]) for n, v in bits(model).items())
    assert torch.equal(out(model), base)


def test_merged_equals_unmerged_in_float64() -> None:
    model, tokenizer = lc.load_model("minilm", device="cpu", dtype="float32")
    model.double()
    x = tokenizer(TEXTS, return_tensors="pt", padding=True)  # one row is shorter, and masked

    def out(m: Any) -> torch.Tensor:
        with torch.no_grad():
            return m(**x).last_hidden_state

    base = out(model)
    adapter = lc.attach(model, spec(model, targets=EVERY["minilm"]))
    assert torch.equal(out(model), base)
    filled(adapter, std=0.02)
    changed = out(model)
    adapter.merge()
    assert off(out(model), changed) < 1e-10 and off(changed, base) > 1e-3


def test_gradients_only_for_the_factors(real: tuple[Any, Out], loaded: tuple[Any, dict[str, torch.Tensor]]) -> None:
    model, _ = real
    adapter = filled(lc.attach(model, spec(model)), std=0.02)
    y = model(**loaded[1])
    (y.logits if "logits" in y else y.last_hidden_state).square().mean().backward()
    mine = {id(p) for p in adapter.parameters()}
    for n, p in model.named_parameters():
        assert (p.grad is not None) == (id(p) in mine), n
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in adapter.parameters())


def test_rows_of_a_batch_equal_separate_passes(real: tuple[Any, Out]) -> None:
    model, out = real
    filled(lc.attach(model, spec(model), name="a"), 1, std=0.02)
    filled(lc.attach(model, spec(model, targets=("k", "up"), rank=4), name="b"), 2, std=0.02)
    alone = {}
    for n in ("a", "b", None):
        lc.switch(model, None, n)
        alone[n] = out(model)
    for names in (["a", "b"], [None, "a"], ["b", "b"]):
        with lc.rows(model, names):
            mixed = out(model)
        for i, n in enumerate(names):
            assert off(mixed[i], alone[n][i]) < 1e-5
    assert off(alone["a"], alone["b"]) > 1e-3


def test_save_and_load_are_exact_and_peft_computes_the_same(real: tuple[Any, Out], tmp_path: Path) -> None:
    model, out = real
    ranks = {"rank_pattern": {"v": 4}, "alpha_pattern": {"o": 4}, "scaling": "alpha/sqrt(r)"}
    adapter = filled(lc.attach(model, spec(model, **ranks)), std=0.02)
    want, factors = out(model), {n: p.detach().clone() for n, p in adapter.named_parameters()}
    adapter.save(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size == lc.budget(model, adapter.spec).file_bytes
    adapter.detach()
    again = lc.load_adapter(model, tmp_path, name="again")
    assert torch.equal(out(model), want)
    assert all(torch.equal(p, factors[n]) for n, p in again.named_parameters())
    again.detach()
    theirs: Any = PeftModel.from_pretrained(model, str(tmp_path))
    try:
        assert off(out(theirs.eval()), want) < 1e-5
    finally:
        theirs.unload()


def test_factored_spectra_equal_the_dense_ones(real: tuple[Any, Out]) -> None:
    model, _ = real
    adapter = filled(lc.attach(model, spec(model, targets=EVERY[model.lora_lab.name], layers=(0, 5))), std=0.02)
    found = lc.spectra(adapter)
    assert found.keys() == adapter.sites.keys()
    for key, s in found.items():
        d = adapter.delta(key)
        dense = np.linalg.svd(d.double().dense().numpy(), compute_uv=False)[:8]
        np.testing.assert_allclose(s.singular_values, dense, rtol=1e-10)
        np.testing.assert_allclose(d.double().singular_values().numpy(), dense, rtol=1e-10)
        assert s.norm == pytest.approx(float(np.sqrt((dense**2).sum())), rel=1e-10)
