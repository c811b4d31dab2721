"""A frozen base of four or eight bits (bitsandbytes, the extra `quant`): LoRA trains beside it, as QLoRA does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import filled, ids, tiny

import lora_core as lc

bnb: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install 'lora-lab[quant]')")


def quantised(kind: str) -> Any:
    model = tiny("llama")
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            if kind == "nf4":
                new = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            else:
                new = bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias=False, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
    return model.to("cpu")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_lora_beside_quantised_weights(kind: str) -> None:
    model = quantised(kind)
    try:
        with torch.no_grad():
            base = model(ids()).logits
    except (RuntimeError, AttributeError) as e:
        pytest.skip(f"bitsandbytes cannot compute {kind} on this machine: {e}")
    adapter = lc.attach(model, lc.LoraSpec(targets=("q", "v", "down"), rank=4))
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, base)
    filled(adapter)
    loss = model(ids()).logits.square().mean()
    loss.backward()
    grads = [p.grad for p in adapter.parameters()]
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in grads)
    with pytest.raises(lc.UserError, match="is quantised"):
        adapter.merge()
    adapter.detach()
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, base)
