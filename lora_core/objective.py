"""What training minimises. The loop in train.py does not know: an objective turns rows into batches and batches into
a sum of losses and a count of tokens (section 2 of the paper: the method is agnostic to the training objective).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from lora_core.tasks import Row

from lora_core.tasks.encode import Encoded, encode_many


@dataclass(frozen=True, kw_only=True)
class Batch:
    """ids (rows, time); labels (rows, time) with −100 where nothing is trained; the number of real tokens."""

    ids: Tensor
    labels: Tensor
    tokens: int
    labelled: int


class CausalLM:
    """−log p(completion | prompt), summed over the completion's tokens and the end of text.

    Two things make it cheap. Rows are padded on the right, where causal attention never looks, so no mask is needed.
    Logits are computed only where there is a label: the vocabulary is the widest matrix of a small model. That is
    done by calling the model's body and its head apart, and only for models where a probe shows that this is the same.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, template: str, max_tokens: int = 256) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        self.max_tokens = min(max_tokens, longest) if isinstance(longest, int) else max_tokens
        self.device = next(model.parameters()).device
        self.split = self._splits()

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        return encode_many(self.tokenizer, rows, self.template, self.max_tokens)

    def batch(self, items: Sequence[Encoded]) -> Batch:
        """Rows of one length, the shorter ones filled up on the right."""
        longest = max(len(e.ids) for e in items)
        ids = torch.empty(len(items), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for i, e in enumerate(items):
            n = len(e.ids)
            row = torch.tensor(e.ids)
            ids[i, :n] = row
            ids[i, n:] = row[-1]  # any token will do: nothing attends to it
            labels[i, e.start : n] = row[e.start :]
        return Batch(ids=ids.to(self.device), labels=labels.to(self.device), tokens=sum(len(e.ids) for e in items),
                     labelled=int((labels[:, 1:] != -100).sum()))  # fmt: skip

    def loss(self, batch: Batch) -> Tensor:
        """Sum of the losses of a batch's labelled tokens, at least float32, nats."""
        targets = batch.labels[:, 1:].reshape(-1)
        at = (targets != -100).nonzero().squeeze(1)
        logits = self.logits(batch.ids, at)
        return F.cross_entropy(wide(logits), targets[at], reduction="sum")

    def logits(self, ids: Tensor, at: Tensor) -> Tensor:
        """Logits (len(at), vocabulary) that predict the token after position at[i] of ids[:, :-1], flattened."""
        if self.split:
            hidden = self._body(ids)[:, :-1]
            return cast(Any, self.model).get_output_embeddings()(hidden.reshape(-1, hidden.shape[-1])[at])
        out = cast(Any, self.model)(input_ids=ids, use_cache=False).logits[:, :-1]
        return out.reshape(-1, out.shape[-1])[at]

    def _body(self, ids: Tensor) -> Tensor:
        body = cast(Any, self.model).base_model
        return body(input_ids=ids, use_cache=False)[0]

    def _splits(self) -> bool:
        """Whether head(body(x)) is the model: some scale or cap their logits in between, and then it is not."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        if head is None or cast(Any, self.model).base_model is self.model:
            return False
        ids = torch.arange(1, 5, device=self.device)[None]
        was = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                whole = cast(Any, self.model)(input_ids=ids, use_cache=False).logits
                return torch.equal(head(self._body(ids)), whole)
        finally:
            self.model.train(was)


def wide(x: Tensor) -> Tensor:
    """16-bit numbers as float32; a softmax over a vocabulary needs it. Others as they are."""
    return x.float() if x.element_size() < 4 else x


def bucketed(lengths: Sequence[int], size: int, generator: torch.Generator, window: int = 32) -> list[list[int]]:
    """One epoch of batches of indices: shuffled, then sorted by length within windows, so that little is padding.

    A window holds `window` batches; the batches' order is shuffled again. A last batch that is not full is dropped
    when there are others.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for i in range(0, len(order), size * window):
        part = sorted(order[i : i + size * window], key=lambda j: lengths[j])
        batches += [part[k : k + size] for k in range(0, len(part), size)]
    if len(batches) > 1:
        batches = [b for b in batches if len(b) == size] or batches
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def endless(lengths: Sequence[int], size: int, seed: int) -> Iterator[list[int]]:
    """Batches of indices, epoch after epoch, each epoch's order drawn from (seed, epoch)."""
    epoch = 0
    while True:
        yield from bucketed(lengths, size, torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        epoch += 1
