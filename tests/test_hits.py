"""What a target hits: modules by layer, and one name that stands for two."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lora_core as lc
from lora_core.errors import UserError
from lora_core.sites import find_sites
from tests.tiny import tiny


@pytest.fixture(scope="module")
def keys_are_values() -> Any:
    """Gemma 4's full-attention layers have no v_proj: what k makes is the value too."""
    gemma = pytest.importorskip("transformers.models.gemma4")
    torch.manual_seed(0)
    config = gemma.Gemma4TextConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_global_key_value_heads=2, head_dim=8, global_head_dim=8, attention_k_eq_v=True,
        layer_types=["sliding_attention", "full_attention"] * 2, hidden_size_per_layer_input=0)  # fmt: skip
    return gemma.Gemma4ForCausalLM(config).eval()


def test_modules_are_counted_layer_by_layer() -> None:
    shapes: Any = lc.layer_shapes(tiny("llama"))
    assert all(m["by_layer"] == [1, 1] and m["also"] is None for m in shapes["matrices"])
    model = tiny("gpt2")
    found: Any = lc.layer_shapes(model)
    for m in found["matrices"]:
        assert m["modules"] == sum(m["by_layer"]) == sum(s.target == m["name"] for s in find_sites(model))


def test_a_key_that_is_also_the_value(keys_are_values: Any) -> None:
    shapes: Any = lc.layer_shapes(keys_are_values)
    by_name = {m["name"]: m for m in shapes["matrices"]}
    assert by_name["k"]["by_layer"] == [1, 1, 1, 1] and by_name["v"]["by_layer"] == [1, 0, 1, 0]
    assert by_name["k"]["also"] == {"name": "v", "layers": [1, 3]} and by_name["v"]["also"] is None
    assert [s.layer for s in lc.select(keys_are_values, lc.LoraSpec(targets=("v",)))] == [0, 2]
    with pytest.raises(UserError, match="'v' hits nothing in layers 1, 3; there k is also v: name k"):
        lc.select(keys_are_values, lc.LoraSpec(targets=("v",), layers=(1, 3)))
    assert len(lc.select(keys_are_values, lc.LoraSpec(targets=("k", "v"), layers=(1, 2)))) == 3


def test_it_really_is_the_value(keys_are_values: Any) -> None:
    """An update of k in such a layer moves the outputs even where only one token can be looked at."""
    model = keys_are_values
    one = torch.tensor([[5]])
    with torch.no_grad():
        before = model(input_ids=one).logits
        adapter = lc.attach(model, lc.LoraSpec(targets=("k",), layers=(1,), rank=2))
        adapter.factors(next(iter(adapter.sites))).B.normal_()
        moved = (model(input_ids=one).logits - before).abs().max()
        adapter.detach()
        still = lc.attach(model, lc.LoraSpec(targets=("k",), layers=(0,), rank=2))
        still.factors(next(iter(still.sites))).B.normal_()
        same = (model(input_ids=one).logits - before).abs().max()
        still.detach()
    assert moved > 1e-3 and same < 1e-5


def test_a_model_without_such_layers_says_nothing_of_it() -> None:
    with pytest.raises(UserError) as told:
        lc.select(tiny("llama"), lc.LoraSpec(targets=("w",)))
    assert "also" not in str(told.value)
