"""Where each family of transformers keeps its matrices: one small table, and no torch.

A family maps each logical matrix (q k v o gate up down) to a module path; {i} is the layer. Where several matrices are
rows of one fused weight, a layout says which rows.
"""

from __future__ import annotations

import re

import numpy as np

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
TITLES = {"q": "query", "k": "key", "v": "value", "o": "attention output", "gate": "MLP gate", "up": "MLP up",
          "down": "MLP down"}  # fmt: skip
STAGES = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 2, "up": 2, "down": 3}

# family -> {target: (module path, layout of the rows or None for the whole weight)}
Table = dict[str, tuple[str, str | None]]


def _table(layer: str, layout: str | None = None, **modules: str) -> Table:
    """Targets by name; the name `qkv` stands for three matrices in one module, in the given layout."""
    table: Table = {}
    for target, module in modules.items():
        path = f"{layer}.{{i}}.{module}"
        table |= {t: (path, layout) for t in "qkv"} if target == "qkv" else {target: (path, None)}
    return table


_LLAMA = _table("layers", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.o_proj",
                gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")  # fmt: skip
_OPT = _table("layers", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.out_proj",
              up="fc1", down="fc2")  # fmt: skip
_GPT2 = _table("h", "concat", qkv="attn.c_attn", o="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj")
_NEOX = _table("layers", "per-head", qkv="attention.query_key_value", o="attention.dense", up="mlp.dense_h_to_4h",
               down="mlp.dense_4h_to_h")  # fmt: skip
_BERT = _table("layer", q="attention.self.query", k="attention.self.key", v="attention.self.value",
               o="attention.output.dense", up="intermediate.dense", down="output.dense")  # fmt: skip
FAMILIES: dict[str, Table] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "cohere",
                     "granite", "stablelm"), _LLAMA),
    "opt": _OPT, "gpt2": _GPT2, "gpt_neox": _NEOX, **dict.fromkeys(("bert", "roberta", "electra"), _BERT),
}  # fmt: skip


def rows_of(layout: str, which: int, out: int, heads: int) -> slice | np.ndarray:
    """The rows of a fused weight (out, in) that are q (which = 0), k (1) or v (2).

    "concat": q, k, v one after the other. "per-head": rows as (head, 3, head_dim), so each is interleaved by head.
    """
    if layout == "concat":
        return slice(which * (out // 3), (which + 1) * (out // 3))
    return np.arange(out).reshape(heads, 3, out // (3 * heads))[:, which].reshape(-1)


def pattern(path: str) -> re.Pattern[str]:
    """A path of the table as a regular expression over module paths, with the layer as its group."""
    return re.compile(r"(?:^|\.)" + re.escape(path).replace(r"\{i\}", r"(\d+)") + "$")


def guess(path: str) -> tuple[str, int | None]:
    """(logical name, layer) of a module path whose model is not at hand; "qkv" for a fused module.

    A path that no family has keeps its last part as its name.
    """
    for table in FAMILIES.values():
        hits = [(t, m) for t, (p, _) in table.items() if (m := pattern(p).search(path))]
        if hits:
            return "".join(t for t, _ in hits), int(hits[0][1][1])
    layer = re.search(r"\.(\d+)\.", path)
    return path.rsplit(".", 1)[-1], int(layer[1]) if layer else None
