"""Which tokens a direction of an update reads and writes: through the embedding and the unembedding. Numpy alone.

q, k, v, gate and up read from the residual stream, behind a norm: a direction v (in,) of theirs is read against every
token's embedding as that norm would give it, as if the token alone stood in the stream. o and down write into the
stream: a direction u (out,) of theirs is read as the change of the logits that it would be if nothing followed but the
last norm and the unembedding. v writes through o, and o reads through v, each head its own part, as if it attended
to that one token. What q and k give goes to attention scores, what gate and up give to the MLP's inside: no tokens.

Both are first-order readings, good at the ends of a model and rough in its middle. How far the first token stands out
of all is told beside what a random direction reaches, since the largest of 50,000 numbers is always large.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_core.base_files import BaseFiles
from lora_core.errors import UserError
from lora_core.stored import StoredSite

PART = 8192  # tokens at a time: 20 MB of a small model
DRAWS = 24  # random directions, both ends of each
# model_type: (before attention, before the MLP, the last one, the embedding, kind of norm)
_LLAMA = ("input_layernorm", "post_attention_layernorm", "model.norm", "model.embed_tokens", "rms")
FAMILIES: dict[str, tuple[str, str, str, str, str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "gemma": (*_LLAMA[:4], "rms+1"),
    "stablelm": (*_LLAMA[:4], "layer"),
    "gpt2": ("ln_1", "ln_2", "transformer.ln_f", "transformer.wte", "layer"),
    "gpt_neox": ("input_layernorm", "post_attention_layernorm", "gpt_neox.final_layer_norm", "gpt_neox.embed_in",
                 "layer"),
}  # fmt: skip
HEADS = ("lm_head", "embed_out")
BEFORE_ATTENTION, BEFORE_MLP = ("q", "k", "v"), ("gate", "up")


@dataclass(frozen=True, kw_only=True)
class Pole:
    """One end of a direction: token numbers, and how many standard deviations each is above the mean of all tokens."""

    ids: tuple[int, ...]
    z: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The tokens of one side of an update's first directions.

    side    "reads" or "writes"; through: the matrix that stands between, or None
    poles   per direction its two ends: (with the sign of u and v as given, with the other)
    chance  what the first token of 19 in 20 random directions stays below, in standard deviations
    """

    side: str
    through: str | None
    poles: tuple[tuple[Pole, Pole], ...]
    chance: float


class Reader:
    """A model's embedding, unembedding and norms, for the matrices of its layers."""

    def __init__(self, base: BaseFiles) -> None:
        if base.kind not in FAMILIES:
            raise UserError(f"which norm stands before which matrix is not known here for {base.kind or 'this'} models")
        self.base = base
        self.attention, self.mlp, self.final, embedding, self.norm = FAMILIES[base.kind]
        self.embedding = self._tensor(f"{embedding}.weight")
        c = base.config
        self.tiny = float(c.get("rms_norm_eps") or c.get("layer_norm_epsilon") or c.get("layer_norm_eps") or 1e-6)
        heads = [base.find(f"{h}.weight") for h in HEADS]
        self.head = next((h for h in heads if h is not None), self.embedding)

    def of(self, site: StoredSite, U: np.ndarray, V: np.ndarray, top: int = 6) -> list[Reading]:
        """What can be said of the directions in the columns of U (out, n) and V (in, n) of a matrix; maybe nothing."""
        out: list[Reading] = []
        g = np.random.default_rng(0)  # random directions go the same way
        U, V = (np.concatenate([M, g.standard_normal((len(M), DRAWS))], 1) for M in (U, V))
        if site.target in BEFORE_ATTENTION + BEFORE_MLP:
            out.append(self._reads(site, V, None, top))
        elif site.target == "o" and (v := self._partner(site, "v")) is not None:
            out.append(self._reads(site, v.T @ self._gathered(V), "v", top))
        if site.target in ("o", "down"):
            out.append(self._writes(U, None, top))
        elif site.target == "v" and (o := self._partner(site, "o")) is not None:
            out.append(self._writes(o @ self._spread(U), "o", top))
        return out

    # ---- reading: v against the normalised embedding of every token
    def _reads(self, site: StoredSite, D: np.ndarray, through: str | None, top: int) -> Reading:
        layer, _, _ = self._layer(site)
        name = f"{layer}.{self.mlp if site.target in BEFORE_MLP else self.attention}"
        return self._scored("reads", through, self._gain(name)[:, None] * D, self.embedding, top, normed=True)

    def _writes(self, D: np.ndarray, through: str | None, top: int) -> Reading:
        D = D - D.mean(0) if self.norm == "layer" else D
        return self._scored("writes", through, self._gain(self.final)[:, None] * D, self.head, top)

    def _scored(self, side: str, through: str | None, D: np.ndarray, table: str, top: int, normed: bool = False
                ) -> Reading:  # fmt: skip
        n = D.shape[1] - DRAWS
        D32 = D.astype(np.float32)
        scores = np.concatenate([(self._normal(E) if normed else E) @ D32 for E in self._rows(table)])
        spread = scores.std(0)
        z = (scores - scores.mean(0)) / np.where(spread > 0, spread, 1.0)  # so the norm's bias says nothing
        chance = float(np.quantile(np.concatenate([z[:, n:].max(0), -z[:, n:].min(0)]), 0.95))
        return Reading(side=side, through=through, chance=chance,
                       poles=tuple((_pole(z[:, i], top), _pole(-z[:, i], top)) for i in range(n)))  # fmt: skip

    def _rows(self, table: str) -> Iterator[np.ndarray]:
        E = self.base.weights.read(table)
        for i in range(0, len(E), PART):
            yield E[i : i + PART]

    def _normal(self, E: np.ndarray) -> np.ndarray:
        if self.norm == "layer":
            E = E - E.mean(1, keepdims=True)
        return E / np.sqrt(np.square(E).mean(1, keepdims=True) + self.tiny)

    def _gain(self, name: str) -> np.ndarray:
        gain = self.base.weights.read(self._tensor(f"{name}.weight")).astype(np.float64)
        return gain + 1.0 if self.norm == "rms+1" else gain

    # ---- the other side of the heads
    def _partner(self, site: StoredSite, target: str) -> np.ndarray | None:
        """W0 of the v or o (out, in) of the same layer; None where they are fused in a way of their own."""
        _, module, name = self._layer(site)
        names = {"v": {"v_proj": "o_proj"}, "o": {"o_proj": "v_proj"}}[site.target]
        if name in names:
            found = self.base.find(f"{module}.{names[name]}.weight")
            W = None if found is None else self.base.weights.read(found).astype(np.float64)
            good = W is not None and self._group() is not None and W.shape[target == "o"] == self._wide(target)
            return W if good else None
        if self.base.kind == "gpt2":
            W = self.base.weights.read(self._tensor(f"{module}.{'c_proj' if target == 'o' else 'c_attn'}.weight"))
            return (W if target == "o" else W[:, 2 * W.shape[0] :]).T.astype(np.float64)
        return None

    def _wide(self, target: str) -> int:
        """Numbers of all query heads (what o reads), or of all key heads (what v gives)."""
        c = self.base.config
        heads = int(c["num_attention_heads"])
        size = int(c.get("head_dim") or c["hidden_size"] // heads)
        return size * (heads if target == "o" else int(c.get("num_key_value_heads") or heads))

    def _group(self) -> int | None:
        """How many query heads share a key head."""
        c = self.base.config
        if self.base.kind == "gpt2":
            return 1
        heads = c.get("num_attention_heads")
        kv = c.get("num_key_value_heads") or heads
        return heads // kv if isinstance(heads, int) and isinstance(kv, int) and kv and heads % kv == 0 else None

    def _spread(self, U: np.ndarray) -> np.ndarray:
        """What v gives, (key heads·size, n), as o reads it: (query heads·size, n), a key head for each of its group."""
        each = self._group() or 1
        size = self._head_size()
        return np.repeat(U.reshape(-1, size, U.shape[1]), each, 0).reshape(-1, U.shape[1])

    def _gathered(self, V: np.ndarray) -> np.ndarray:
        """The transpose of `_spread`."""
        each, size = self._group() or 1, self._head_size()
        return V.reshape(-1, each, size, V.shape[1]).sum(1).reshape(-1, V.shape[1])

    def _head_size(self) -> int:
        c: dict[str, Any] = self.base.config
        heads = int(c.get("num_attention_heads") or c["n_head"])
        return int(c.get("head_dim") or (c.get("hidden_size") or c["n_embd"]) // heads)

    # ---- names
    def _layer(self, site: StoredSite) -> tuple[str, str, str]:
        """(path of the layer, path of the module's parent, the module's own name)."""
        found = re.match(r"(.*?\.\d+)\.", site.path)
        if found is None:
            raise UserError(f"{site.path} is in no layer")
        parent, _, name = site.path.rpartition(".")
        return found[1], parent, name

    def _tensor(self, name: str) -> str:
        found = self.base.find(name)
        if found is None:
            raise UserError(f"{self.base.folder.name} has no {name}")
        return found


def _pole(z: np.ndarray, top: int) -> Pole:
    ids = np.argpartition(-z, min(top, len(z) - 1))[:top]
    ids = ids[np.argsort(-z[ids], kind="stable")]
    return Pole(ids=tuple(ids.tolist()), z=tuple(z[ids].tolist()))
