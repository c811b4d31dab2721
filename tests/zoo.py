"""Every architecture that the table names, as a tiny random model; and which rows are whose, written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import nn

tr: Any = transformers  # its configs take more keywords than they declare

V = 200
_D: dict[str, Any] = dict(vocab_size=V, bos_token_id=1, eos_token_id=2, pad_token_id=3)
_H: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **_D)
_L: dict[str, Any] = dict(intermediate_size=48, num_key_value_heads=2, **_H)
_E: dict[str, Any] = dict(intermediate_size=48, max_position_embeddings=64, hidden_dropout_prob=0.0,
                          attention_probs_dropout_prob=0.0, **_H)  # fmt: skip
_G: dict[str, Any] = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, **_D)
_FALCON: dict[str, Any] = dict(alibi=False, bias=True, ffn_hidden_size=48, **_H)

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tr.LlamaConfig(**_L),
    "llama, tied, with biases": lambda: tr.LlamaConfig(
        attention_bias=True, mlp_bias=True, tie_word_embeddings=True, **_L),
    "mixtral": lambda: tr.MixtralConfig(num_local_experts=3, num_experts_per_tok=2, **_L),
    "qwen2_moe": lambda: tr.Qwen2MoeConfig(
        num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40,
        mlp_only_layers=[1], **_L),
    "mistral, wide heads": lambda: tr.MistralConfig(head_dim=16, **_L),
    "qwen2": lambda: tr.Qwen2Config(**_L),
    "qwen3": lambda: tr.Qwen3Config(head_dim=16, **_L),
    "gemma": lambda: tr.GemmaConfig(head_dim=16, **_L),
    "gemma2": lambda: tr.Gemma2Config(head_dim=16, **_L),
    "gemma3_text": lambda: tr.Gemma3TextConfig(head_dim=16, **_L),
    "olmo": lambda: tr.OlmoConfig(**_L),
    "olmo2": lambda: tr.Olmo2Config(**_L),
    "cohere": lambda: tr.CohereConfig(**_L),
    "granite": lambda: tr.GraniteConfig(**_L),
    "stablelm": lambda: tr.StableLmConfig(**_L),
    "starcoder2": lambda: tr.Starcoder2Config(**_L),
    "phi": lambda: tr.PhiConfig(intermediate_size=48, **_H),
    "phi3": lambda: tr.Phi3Config(**_L),
    "opt": lambda: tr.OPTConfig(ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32, **_H),
    "gptj": lambda: tr.GPTJConfig(rotary_dim=4, **_G),
    "gpt_neo": lambda: tr.GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]], max_position_embeddings=64, **_D),
    "gpt2": lambda: tr.GPT2Config(**_G),
    "gpt_bigcode, one key head": lambda: tr.GPTBigCodeConfig(multi_query=True, **_G),
    "gpt_bigcode": lambda: tr.GPTBigCodeConfig(multi_query=False, **_G),
    "gpt_neox": lambda: tr.GPTNeoXConfig(intermediate_size=48, max_position_embeddings=64, **_H),
    "bloom": lambda: tr.BloomConfig(n_head=4, n_layer=2, hidden_size=32, **_D),
    "falcon-rw": lambda: tr.FalconConfig(multi_query=False, new_decoder_architecture=False, **_FALCON),
    "falcon-7b": lambda: tr.FalconConfig(multi_query=True, new_decoder_architecture=False, **_FALCON),
    "falcon-40b": lambda: tr.FalconConfig(new_decoder_architecture=True, num_kv_heads=2, **_FALCON),
    "mpt": lambda: tr.MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, expansion_ratio=2, **_D),
    "codegen": lambda: tr.CodeGenConfig(rotary_dim=4, **_G),
    "bert": lambda: tr.BertConfig(is_decoder=False, **_E),
    "roberta": lambda: tr.RobertaConfig(**_E),
    "electra": lambda: tr.ElectraConfig(embedding_size=16, **_E),
    "deberta-v2": lambda: tr.DebertaV2Config(
        relative_attention=True, position_biased_input=False, pos_att_type=["c2p", "p2c"], share_att_key=True, **_E),
    "distilbert": lambda: tr.DistilBertConfig(
        dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64, **_D),
    "albert": lambda: tr.AlbertConfig(embedding_size=16, **_E),
    "t5": lambda: tr.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=3, **_D),
    "t5, gated": lambda: tr.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        decoder_start_token_id=3, **_D),
    "bart": lambda: tr.BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, decoder_start_token_id=2, **_D),
}  # fmt: skip

# rows of the fused weight as (shape to view them in, index of q, of k, of v): from the layouts' own descriptions
_EACH = (4, 3, 8)
FUSED: dict[str, dict[str, np.ndarray]] = {}


def _fuse(name: str, shape: tuple[int, ...], **index: Any) -> None:
    rows = np.arange(int(np.prod(shape))).reshape(shape)
    FUSED[name] = {t: rows[i].reshape(-1) for t, i in index.items()}


_ = slice(None)
for _name in ("gpt_bigcode", "gpt_neox", "bloom", "falcon-rw"):
    _fuse(_name, _EACH, q=(_, 0), k=(_, 1), v=(_, 2))
for _name in ("gpt2", "mpt"):
    _fuse(_name, (3, 32), q=0, k=1, v=2)
for _name in ("gpt_bigcode, one key head", "falcon-7b"):
    _fuse(_name, (6, 8), q=slice(0, 4), k=4, v=5)
_fuse("falcon-40b", (2, 4, 8), q=(_, slice(0, 2)), k=(_, 2), v=(_, 3))
_fuse("phi3", (8, 8), q=slice(0, 4), k=slice(4, 6), v=slice(6, 8))
_fuse("codegen", (4, 3, 1, 8), q=(_, 0), k=(_, 2), v=(_, 1))


def make(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """The model in eval mode, with biases that are not zero and eager attention where sdpa is not to be had."""
    config = CONFIGS[name]()
    if dtype == torch.float64:
        config._experts_implementation = "eager"  # the grouped product has no float64
    torch.manual_seed(seed)
    kind = tr.AutoModelForCausalLM
    if config.model_type in ("t5", "bart"):
        kind = tr.AutoModelForSeq2SeqLM
    elif is_encoder(config):
        kind = tr.AutoModelForSequenceClassification
    model = cast(nn.Module, kind.from_config(config)).to(dtype).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("bias"):
                p.normal_(0, 0.05)
    return model


def is_encoder(config: Any) -> bool:
    return config.model_type in ("bert", "roberta", "electra", "deberta-v2", "distilbert", "albert")


def inputs(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, V, (3, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {})}


def out(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(model)).logits
