"""The table of families against every architecture: what is where, and the laws that hold for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny import bits, filled, targets_of
from zoo import CONFIGS, FUSED, inputs, make, out

import lora_core as lc
from lora_core.families import FAMILIES, guess
from lora_core.sites import weight_shape

every = pytest.mark.parametrize("name", CONFIGS)


def all_of(model: Any, **more: Any) -> lc.LoraSpec:
    return lc.LoraSpec(targets=targets_of(model), rank=3, alpha=6, **more)


def test_the_zoo_has_every_family_of_the_table() -> None:
    assert {CONFIGS[n]().model_type for n in CONFIGS} == set(FAMILIES)


@every
def test_every_matrix_of_the_layers_is_found_once(name: str) -> None:
    model = make(name)
    sites = lc.find_sites(model)
    assert len({s.key for s in sites}) == len(sites)
    heads = {"classifier", "pooler", "score", "lm_head", "embeddings_project", "embedding_hidden_mapping_in"}
    heads |= {"shared", "pre_classifier"}
    inner = {p for p, m in model.named_modules() if weight_shape(m) and not heads & set(p.split("."))}
    inner -= {p for p in inner if p.endswith(("pos_key_proj", "pos_query_proj", "relative_attention_bias"))}
    inner -= {p for p in inner if p.endswith("shared_expert_gate")}
    matrices = [s for s in sites if s.expert is None]
    assert {s.path for s in matrices} == inner, "nothing is missed and nothing is invented"
    rows = {p: np.zeros(weight_shape(model.get_submodule(p))[0], int) for p in inner}  # type: ignore[index]
    for s in matrices:
        index = np.arange(s.full)[s.layout.rows()] if s.layout else np.arange(s.full)
        assert len(index) == s.out
        rows[s.path][index] += 1
    assert all((n == 1).all() for n in rows.values()), "the rows of a fused weight are parted without rest or overlap"


@pytest.mark.parametrize("name", FUSED)
def test_fused_rows_are_whose_they_are(name: str) -> None:
    first = {}
    for s in lc.find_sites(make(name)):
        if s.layout and s.layer == 0:
            first.setdefault(s.target, np.arange(s.full)[s.layout.rows()])
    for target, rows in FUSED[name].items():
        assert np.array_equal(first[target], rows), target


@every
def test_the_laws(name: str) -> None:
    """Bit-identical at first, merged = unmerged, W0 back to the bit, gradients for the factors alone."""
    model = make(name)
    base, weights = out(model), bits(model)
    adapter = lc.attach(model, all_of(model))
    assert torch.equal(out(model), base)
    filled(adapter)
    changed = out(model)
    assert (changed - base).abs().max() > 1e-6
    model(**inputs(model)).logits.square().sum().backward()
    with_grad = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_grad == {n for n, _ in model.named_parameters() if ".lora." in n}
    adapter.merge()
    torch.testing.assert_close(out(model), changed, rtol=0, atol=1e-10)
    adapter.unmerge()
    adapter.detach()
    assert torch.equal(out(model), base) and all(torch.equal(v, weights[n]) for n, v in bits(model).items())


@every
def test_each_matrix_alone_is_its_dense_self(name: str) -> None:
    """The output with ΔW on one matrix equals that of a model whose weight had ΔW added to the rows by hand."""
    model = make(name)
    for target in targets_of(model):
        adapter = filled(lc.attach(model, lc.LoraSpec(targets=(target,), rank=2)))
        want = out(model)
        deltas, sites = adapter.deltas(), adapter.sites
        adapter.detach()
        before = bits(model)
        with torch.no_grad():
            for key, d in deltas.items():
                s = sites[key]
                W = getattr(model.get_submodule(s.path), s.param)
                W = W if s.expert is None else W[s.expert]
                view = W.T if s.transposed else W
                view[slice(None) if s.rows is None else s.rows] += d.dense()
        torch.testing.assert_close(out(model), want, rtol=0, atol=1e-10)
        model.load_state_dict(before)


@every
def test_peft_gives_the_same_outputs(name: str, tmp_path: Path) -> None:
    model = make(name, torch.float32)
    adapter = filled(lc.attach(model, all_of(model)))
    want = out(model)
    adapter.save(tmp_path)
    adapter.detach()
    again = lc.load_adapter(model, tmp_path)
    assert torch.equal(out(model), want)
    again.detach()
    theirs: Any = PeftModel.from_pretrained(model, str(tmp_path))
    torch.testing.assert_close(out(theirs.eval()), want, rtol=0, atol=2e-5)


@every
def test_rows_of_a_batch_equal_separate_passes(name: str) -> None:
    model = make(name)
    filled(lc.attach(model, all_of(model), name="a"), 1)
    filled(lc.attach(model, lc.LoraSpec(targets=("q", "v"), rank=2), name="b"), 2)
    alone = {}
    for n in ("a", "b", None):
        lc.switch(model, None, n)
        alone[n] = out(model)
    names = ["b", None, "a"]
    if name == "deberta-v2":  # projects its position table once for all rows, which cannot be several adapters' doing
        with pytest.raises(ValueError, match="for all rows together"), lc.rows(model, names):
            out(model)
        return
    with lc.rows(model, names):
        mixed = out(model)
    for i, n in enumerate(names):
        torch.testing.assert_close(mixed[i], alone[n][i], rtol=0, atol=1e-10)


def test_names_of_a_stored_adapter_are_guessed_without_its_model() -> None:
    for name in CONFIGS:
        for s in lc.find_sites(make(name)):
            target, layer = guess(s.path if s.expert is None else f"{s.path}.{s.param}.{s.expert}")
            assert layer == s.layer and (s.target in target if s.layout else target == s.target), (name, s.path, target)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in FUSED and not n.startswith(("t5", "bert", "roberta"))])
def test_an_architecture_outside_the_table_is_mapped_by_its_names(name: str) -> None:
    model = make(name)
    known = {s.path: (s.target, s.layer) for s in lc.find_sites(model)}
    model.config.model_type = "unheard-of"
    guessed = {s.path: (s.target, s.layer) for s in lc.find_sites(model)}
    assert guessed.items() <= known.items(), "nothing is placed wrongly"
    if name not in ("electra", "deberta-v2", "albert", "phi3"):  # whose o or MLP stand apart from their neighbours
        assert guessed.keys() == known.keys()
    adapter = filled(lc.attach(model, lc.LoraSpec(targets=("q", "v"), rank=2)))
    changed = out(model)
    adapter.merge()
    torch.testing.assert_close(out(model), changed, rtol=0, atol=1e-10)


def test_what_is_no_attention_gets_no_names_but_paths_work() -> None:
    import transformers

    config = transformers.MambaConfig(vocab_size=200, hidden_size=32, num_hidden_layers=2, state_size=4)
    model: Any = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    assert lc.find_sites(model) == []
    with pytest.raises(lc.UserError, match="give module paths instead"):
        lc.attach(model, lc.LoraSpec())
    path = "backbone.layers.0.mixer.out_proj"
    assert path in lc.listing(model)
    filled(lc.attach(model, lc.LoraSpec(targets=(path,), rank=2)))
    assert lc.listing(model, lc.LoraSpec(targets=(path,), rank=2)).endswith(path)
