"""Where each family of transformers keeps its matrices: one small table, and no torch.

A family maps each logical matrix (q k v o gate up down) to module paths; {i} is the layer, {n} any other number. Where
several matrices are rows of one fused weight, a Layout says which rows; families differ in how they order them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")  # matrices of the layers
ENDS = ("embed", "head")  # matrices around them
DIRECT = ("norm", "bias")  # vectors that are trained themselves
TITLES = {"q": "query", "k": "key", "v": "value", "o": "attention output", "gate": "MLP gate", "up": "MLP up",
          "down": "MLP down"}  # fmt: skip
STAGES = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 2, "up": 2, "down": 3}


class Layout(NamedTuple):
    """Which rows of a fused weight (full, in) are one of its matrices.

    name    "concat": q, k, v one after the other; "groups": for each key head its query heads, its key, its value;
            "codegen": four blocks of q, v, k; "halves": gate, then up; "alternate": gate, up, gate, up, …
    which   q 0, k 1, v 2; gate 0, up 1
    heads   query heads (0 where the weight holds k and v alone); groups: key heads
    full    rows of the whole weight
    """

    name: str
    which: int
    heads: int
    groups: int
    full: int

    def rows(self) -> slice | np.ndarray:
        """A slice where the rows lie together, else their indices."""
        name, which, heads, groups, full = self
        if name == "halves":
            return slice(which * (full // 2), (which + 1) * (full // 2))
        if name == "alternate":
            return np.arange(which, full, 2)
        if name == "codegen":  # (4, [q, v, k], heads/4, head_dim); four is the number of chips it was trained on
            return np.arange(full).reshape(4, 3, full // 12)[:, (0, 2, 1)[which]].reshape(-1)
        size = full // (heads + 2 * groups)  # of a head
        if name == "concat":
            ends = (0, heads * size, (heads + groups) * size, full)
            return slice(ends[which], ends[which + 1])
        each = heads // groups
        grouped = np.arange(full).reshape(groups, each + 2, size)
        return (grouped[:, :each], grouped[:, each], grouped[:, each + 1])[which].reshape(-1)


# ---- how a fused weight is laid out, by its model's config: (name, heads, groups) ----------------------------------
Order = Callable[[Any], tuple[str, int, int]]


def _concat(c: Any) -> tuple[str, int, int]:
    return "concat", c.num_attention_heads, getattr(c, "num_key_value_heads", None) or c.num_attention_heads


def _kv_only(c: Any) -> tuple[str, int, int]:
    return "concat", 0, c.num_attention_heads


def _by_head(c: Any) -> tuple[str, int, int]:
    return "groups", c.num_attention_heads, c.num_attention_heads


def _bigcode(c: Any) -> tuple[str, int, int]:
    return ("concat", c.num_attention_heads, 1) if c.multi_query else _by_head(c)


def _falcon(c: Any) -> tuple[str, int, int]:
    if c.new_decoder_architecture:
        return "groups", c.num_attention_heads, c.num_kv_heads
    return _bigcode(c)


def _codegen(c: Any) -> tuple[str, int, int]:
    return "codegen", c.num_attention_heads, c.num_attention_heads


def _halves(c: Any) -> tuple[str, int, int]:
    return "halves", 0, 0


# ---- the table: family -> {target: [(module path, order or None for a weight of its own)]} ---------------------------
Table = dict[str, list[tuple[str, Order | None]]]


def _table(layer: str, order: Order = _concat, /, **modules: str) -> Table:
    """Targets by module. `qkv`, `kv` and `gate_up` stand for matrices in one weight; a space parts several modules."""
    table: Table = {}
    for name, paths in modules.items():
        fused = {"qkv": ("qkv", order), "kv": ("kv", _kv_only), "gate_up": (("gate", "up"), _halves)}.get(name)
        for target in fused[0] if fused else (name,):
            table.setdefault(target, []).extend((f"{layer}.{p}", fused[1] if fused else None) for p in paths.split())
    return table


def _both(*tables: Table) -> Table:
    joined: Table = {}
    for t in tables:
        for target, places in t.items():
            joined.setdefault(target, []).extend(places)
    return joined


def _attention(at: str, o: str, names: str = "q_proj k_proj v_proj") -> dict[str, str]:
    return {**{t: f"{at}.{n}" for t, n in zip("qkv", names.split())}, "o": f"{at}.{o}"}


_QKVO = _attention("self_attn", "o_proj")
_SELF = "attention.self"
_LLAMA = _table("layers.{i}", **_QKVO, gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")
_BERT = _table("layer.{i}", q=f"{_SELF}.query", k=f"{_SELF}.key", v=f"{_SELF}.value", o="attention.output.dense",
               up="intermediate.dense", down="output.dense")  # fmt: skip
_NEOX_MLP = {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}
_T5_MLP = {"gate": "DenseReluDense.wi_0", "up": "DenseReluDense.wi_1 DenseReluDense.wi", "down": "DenseReluDense.wo"}

FAMILIES: dict[str, Table] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "cohere",
                     "granite", "stablelm"), _LLAMA),
    "mixtral": _table("layers.{i}", **_QKVO),
    "qwen2_moe": _both(_LLAMA, _table("layers.{i}.mlp.shared_expert", gate="gate_proj", up="up_proj",
                                      down="down_proj")),
    "starcoder2": _table("layers.{i}", **_QKVO, up="mlp.c_fc", down="mlp.c_proj"),
    "phi": _table("layers.{i}", **_attention("self_attn", "dense"), up="mlp.fc1", down="mlp.fc2"),
    "opt": _table("layers.{i}", **_attention("self_attn", "out_proj"), up="fc1", down="fc2"),
    "gptj": _table("h.{i}", **_attention("attn", "out_proj"), up="mlp.fc_in", down="mlp.fc_out"),
    "gpt_neo": _table("h.{i}", **_attention("attn.attention", "out_proj"), up="mlp.c_fc", down="mlp.c_proj"),
    "gpt2": _both(_table("h.{i}", qkv="attn.c_attn", o="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj"),
                  _table("h.{i}.crossattention", q="q_attn", kv="c_attn", o="c_proj")),
    "gpt_bigcode": _table("h.{i}", _bigcode, qkv="attn.c_attn", o="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj"),
    "gpt_neox": _table("layers.{i}", _by_head, qkv="attention.query_key_value", o="attention.dense", **_NEOX_MLP),
    "bloom": _table("h.{i}", _by_head, qkv="self_attention.query_key_value", o="self_attention.dense", **_NEOX_MLP),
    "falcon": _table("h.{i}", _falcon, qkv="self_attention.query_key_value", o="self_attention.dense", **_NEOX_MLP),
    "mpt": _table("blocks.{i}", qkv="attn.Wqkv", o="attn.out_proj", up="ffn.up_proj", down="ffn.down_proj"),
    "codegen": _table("h.{i}", _codegen, qkv="attn.qkv_proj", o="attn.out_proj", up="mlp.fc_in", down="mlp.fc_out"),
    "phi3": _table("layers.{i}", qkv="self_attn.qkv_proj", o="self_attn.o_proj", gate_up="mlp.gate_up_proj",
                   down="mlp.down_proj"),
    **dict.fromkeys(("bert", "roberta", "electra"), _BERT),
    "deberta-v2": {**_BERT, **_table("layer.{i}", q=f"{_SELF}.query_proj", k=f"{_SELF}.key_proj",
                                     v=f"{_SELF}.value_proj")},
    "distilbert": _table("layer.{i}", **_attention("attention", "out_lin", "q_lin k_lin v_lin"), up="ffn.lin1",
                         down="ffn.lin2"),
    "albert": _table("albert_layer_groups.{i}.albert_layers.{n}",
                     **_attention("attention", "dense", "query key value"), up="ffn", down="ffn_output"),
    "t5": _both(*(_table(f"block.{{i}}.layer.{n}", **modules) for n, modules in (
        (0, _attention("SelfAttention", "o", "q k v")), (1, _attention("EncDecAttention", "o", "q k v")),
        (1, _T5_MLP), (2, _T5_MLP)))),
    "bart": _both(_table("layers.{i}", **_attention("self_attn", "out_proj"), up="fc1", down="fc2"),
                  _table("layers.{i}", **_attention("encoder_attn", "out_proj"))),
}  # fmt: skip


# What the matrices of an architecture outside the table are usually called; by the last part of the path.
USUAL: dict[str, tuple[str, ...]] = {
    "q": ("q_proj", "query", "q_lin", "query_proj", "wq", "to_q", "q"),
    "k": ("k_proj", "key", "k_lin", "key_proj", "wk", "to_k", "k"),
    "v": ("v_proj", "value", "v_lin", "value_proj", "wv", "to_v", "v"),
    "o": ("o_proj", "out_proj", "out_lin", "wo", "to_out", "dense", "o"),
    "gate": ("gate_proj", "wi_0"),
    "up": ("up_proj", "fc1", "fc_in", "c_fc", "lin1", "dense_h_to_4h", "wi", "wi_1"),
    "down": ("down_proj", "fc2", "fc_out", "c_proj", "lin2", "dense_4h_to_h", "wo"),
}


def inspect(paths: list[str]) -> dict[str, str]:
    """{path: target} for the matrices at these paths, by their names and their neighbours.

    Attention needs q, k and v side by side, and o beside them; where q_proj, k_proj and o_proj have no v_proj, k is
    also v. An MLP needs up and down side by side. So a module that is merely called out_proj is nothing, and what
    cannot be placed is left out.
    """
    blocks: dict[str, dict[str, str]] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        if re.search(r"(^|\.)\d+(\.|$)", parent):  # only what is repeated, layer by layer
            blocks.setdefault(parent, {})[name] = path
    found: dict[str, str] = {}
    for block in blocks.values():
        named = {t: [block[n] for n in names if n in block] for t, names in USUAL.items()}
        attention = all(named[t] for t in "qkv") or not named["v"] and {"q_proj", "k_proj", "o_proj"} <= set(block)
        mlp = not attention and all(named[t] for t in ("up", "down"))
        for t in ("q", "k", "v", "o") if attention else ("gate", "up", "down") if mlp else ():
            if len(named[t]) == 1:
                found[named[t][0]] = t
    return found


def pattern(path: str) -> re.Pattern[str]:
    """A path of the table as a regular expression over module paths, with the layer as its group."""
    text = re.escape(path).replace(r"\{i\}", r"(\d+)").replace(r"\{n\}", r"\d+")
    return re.compile(r"(?:^|\.)" + text + "$")


def guess(path: str) -> tuple[str, int | None]:
    """(logical name, layer) of a module path whose model is not at hand; "qkv" for a fused module.

    Experts are named with their parameter and number: …experts.gate_up_proj.3 is "gateup". A path that no family has
    keeps its last part as its name.
    """
    layer = re.search(r"\.(\d+)\.", path)
    expert = re.search(r"experts\.(gate_up|up|down)_proj(\.\d+)?$", path)
    if expert:
        return expert[1].replace("_", ""), int(layer[1]) if layer else None
    for table in FAMILIES.values():
        hits = [(t, m) for t, places in table.items() for p, _ in places if (m := pattern(p).search(path))]
        if hits:
            return "".join(t for t, _ in hits), int(hits[0][1][1])
    return path.rsplit(".", 1)[-1], int(layer[1]) if layer else None
