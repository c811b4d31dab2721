"""The price of an adapter, against the paper's counts, real files and the page's coefficients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, targets_of, tiny
from transformers import GPT2Config, LlamaConfig

import lora_core as lc
from lora_core.budget import budget_coefficients, meta_model

SMOL = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    vocab_size=49152, tie_word_embeddings=True)  # fmt: skip


def test_golden_counts_without_weights() -> None:
    """|Θ| = 2·L̂·d·r (section 7.1) on the paper's models, from their shapes on the meta device."""
    gpt2_medium = meta_model(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    assert lc.budget(gpt2_medium, lc.LoraSpec(rank=4)).trainable == 393_216
    gpt3 = meta_model(GPT2Config(n_embd=12288, n_layer=96, n_head=96, vocab_size=50257, n_positions=2048))
    assert lc.budget(gpt3, lc.LoraSpec(rank=4)).trainable == 18_874_368
    b = lc.budget(meta_model(SMOL), lc.LoraSpec(targets=("q", "v"), rank=8, alpha=16))
    assert (b.trainable, b.total, b.matrices) == (460_800, 134_515_008, 60)
    assert b.fraction == pytest.approx(0.0034, abs=1e-4)
    assert b.per_target == {"q": 276_480, "v": 184_320}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [("q", "v"), ("v",), None])
def test_file_bytes_are_the_files(family: str, targets: tuple[str, ...] | None, tmp_path: Path) -> None:
    model = tiny(family)
    spec = lc.LoraSpec(targets=targets or targets_of(model), rank=3, rank_pattern={"v": 2})
    foretold = lc.budget(model, spec)
    adapter = lc.attach(model, spec)
    assert lc.budget(model, spec) == foretold, "an attached adapter is no part of the model"
    adapter.save(tmp_path)
    assert foretold.file_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert foretold.trainable == sum(p.numel() for p in adapter.parameters())


@pytest.mark.parametrize("targets", [("q", "v"), ("gate", "up", "down"), ("q", "k", "v", "o", "gate", "up", "down")])
@pytest.mark.parametrize("layers", ["all", tuple(range(15, 30)), (3,)])
def test_the_pages_coefficients_give_the_same(targets: tuple[str, ...], layers: tuple[int, ...] | str) -> None:
    model = meta_model(SMOL)
    c, n_layers = budget_coefficients(model), 30 if layers == "all" else len(layers)
    lowest = 0 if layers == "all" else int(min(layers))
    for rank in (1, 8, 64):
        b = lc.budget(model, lc.LoraSpec(targets=targets, layers=layers, rank=rank), tokens=520, labelled=240)  # type: ignore[arg-type]
        n = rank * sum(c["per_rank"][t] for t in targets) * n_layers
        depth = (c["layers"] - lowest) / c["layers"]
        assert n == b.trainable and c["total"] == b.total
        assert c["file_bytes"] * n + c["header"] * b.matrices == pytest.approx(b.file_bytes, rel=0.02)
        acts = 520 * c["act_per_token"] * depth + 240 * c["logit_bytes"]
        assert c["weights"] + acts + c["state"] * n == pytest.approx(b.train_bytes, rel=1e-6)
        flops = 2 * c["body"] * 520 * (1 + depth) + 4 * c["head"] * 240 + 6 * n * 520
        assert flops == pytest.approx(b.step_flops, rel=1e-6)


def test_lora_is_cheaper_and_by_how_much() -> None:
    b = lc.budget(meta_model(SMOL), lc.LoraSpec())
    assert b.train_bytes < b.full_train_bytes / 2 and b.file_bytes < b.full_bytes / 100
    assert b.weight_bytes == b.full_bytes == 134_515_008 * torch.finfo(meta_model(SMOL).dtype).bits // 8  # type: ignore[arg-type]
    assert b.to_dict()["trainable"] == b.trainable


def test_the_storage_of_many_tasks() -> None:
    """More than the model for one task, far less for many: the paper's 354 GB against 35 TB (section 4.2)."""
    b = lc.budget(meta_model(SMOL), lc.LoraSpec())
    full, lora = b.storage(1)
    assert lora > full and b.storage(2)[1] < b.storage(2)[0]
    gpt3 = replace(b, full_bytes=350 * 10**9, file_bytes=35 * 10**6)
    assert gpt3.storage(100) == (35_000 * 10**9, 353_500 * 10**6)
    assert b.flops_per_token * b.tokens == pytest.approx(b.step_flops)


def test_a_spec_that_does_not_fit_is_refused() -> None:
    with pytest.raises(lc.UserError, match="no matrix 'gate' in GPT2LMHeadModel"):
        lc.budget(meta_model(GPT2Config(n_embd=32, n_layer=1, n_head=2)), lc.LoraSpec(targets=("gate",)))
