"""Tiny random models in transformers' format, made in some milliseconds: what a user's local folder looks like."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from tests.tokenizer_fixture import tiny_tokenizer


def link_models(home: Path) -> None:
    """Let a folder of LoRA Lab have the models that the user has already; the default one is among them."""
    from lora_core import embedded
    from lora_core.home import home_path
    from lora_core.models import DEFAULT

    elsewhere = os.environ.pop("LORA_LAB_HOME", None)
    try:
        embedded.fetch(DEFAULT)
        (home / "models").symlink_to(home_path() / "models")
    finally:
        if elsewhere is not None:
            os.environ["LORA_LAB_HOME"] = elsewhere


def tiny_llama(folder: Path, *, layers: int = 2, seed: int = 0, **changes: Any) -> Path:
    """Saves a Llama of some 30,000 parameters with its tokenizer; q and o are (32, 32), k and v (16, 32)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_bert(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Saves a bare BERT encoder of some 30,000 parameters with its tokenizer, which knows no end of text."""
    from transformers import BertConfig, BertModel

    tokenizer = tiny_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertModel(BertConfig(**{**settings, **changes}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    return folder
