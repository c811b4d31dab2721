"""Tiny random models of each family, for tests: the shapes are real in kind (grouped keys, fused rows, Conv1D)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

from lora_core.adapter import Adapter

VOCAB = 400
FAMILIES = ("llama", "gpt2", "gpt_neox")


def tiny(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A two-layer model with hidden size 32, in eval mode."""
    common: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    config = {
        "llama": lambda: LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128, tie_word_embeddings=True, **common),
        "gpt2": lambda: GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common),
        "gpt_neox": lambda: GPTNeoXConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, **common),
    }[family]()  # fmt: skip
    torch.manual_seed(seed)
    model = cast(nn.Module, AutoModelForCausalLM.from_config(config)).to(dtype).eval()
    with torch.no_grad():  # biases start at zero, which would hide a mistake about them
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.02)
    return model


def targets_of(model: nn.Module) -> tuple[str, ...]:
    """All logical matrices that the model has."""
    from lora_core.sites import find_sites

    return tuple(dict.fromkeys(s.target for s in find_sites(model)))


def filled(adapter: Adapter, seed: int = 1, std: float = 0.1) -> Adapter:
    """The adapter with random A and B, as after training."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * std)
    return adapter


def ids(rows: int = 3, time: int = 7, seed: int = 2) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, time), generator=torch.Generator().manual_seed(seed))


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every weight, to compare bit by bit."""
    return {n: v.clone() for n, v in model.state_dict().items()}
