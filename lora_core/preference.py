"""Preference: of two answers to a prompt, one is to become likelier than the other (DPO, arXiv 2305.18290)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.errors import UserError
from lora_core.objective import Batch, CausalLM
from lora_core.tasks.encode import Encoded

if TYPE_CHECKING:
    from lora_core.adapter import Adapter
    from lora_core.tasks import Row

BETA = 0.1  # as in the paper's experiments
PASSES = 4 / 3  # work of a step over that of the same tokens without the reference: a forward pass is a third of it


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with the better answer and with the worse one; `number` tells it apart from the objective's others."""

    chosen: Encoded
    rejected: Encoded
    number: int

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True, kw_only=True)
class PairBatch(Batch):
    """ids and labels (2·pairs, time): all better answers, then all worse ones.

    reference (2·pairs,): log p of each answer without the adapter, nats
    """

    reference: Tensor


class Preference:
    """−log σ(β·((log π(y₊) − log π₀(y₊)) − (log π(y₋) − log π₀(y₋)))), summed over the pairs (equation 7).

    π is the model with the adapter, π₀ the same model with the adapter switched off: full fine-tuning has to keep a
    second copy of the model for that. At the start the two are one, and the loss is log 2.

    adapter   the one that is trained; other adapters that are on belong to both models
    beta      how dear it is to move away from π₀: the larger, the closer the model stays

    Rows need a `rejected` answer beside their completion. π₀ is asked in evaluation mode, in the same batch as π, so
    that equal models give equal numbers.
    """

    name = "preference"

    def __init__(self, adapter: Adapter, tokenizer: Any, template: str, max_tokens: int = 256, *,
                 beta: float = BETA) -> None:  # fmt: skip
        self.adapter, self.model, self.beta = adapter, adapter.model, beta
        self.lm = CausalLM(self.model, tokenizer, template, max_tokens)
        self._numbers = itertools.count()
        self._known: dict[tuple[Any, ...], Tensor] = {}

    def check(self, adapter: Adapter) -> None:
        """UserError for a model that writes no text, and for another adapter than the objective's own."""
        self.lm.check(adapter)
        if adapter is not self.adapter:
            raise UserError(f"this Preference was made for adapter {self.adapter.name!r}, not {adapter.name!r}")

    def encode(self, rows: Sequence[Row]) -> list[Pair]:
        """Raises UserError for a row without a rejected answer."""
        for row in rows:
            if not row.rejected:
                where = f"line {row.line}: " if row.line else ""
                raise UserError(f"{where}no rejected answer; a pair has the keys prompt, chosen and rejected")
        chosen = self.lm.encode(rows)
        rejected = self.lm.encode([worse(r) for r in rows])
        return [Pair(c, r, next(self._numbers)) for c, r in zip(chosen, rejected, strict=True)]

    def batch(self, items: Sequence[Pair]) -> PairBatch:
        b = self.lm.batch([e.chosen for e in items] + [e.rejected for e in items])
        reference = self._reference(b) if torch.is_grad_enabled() else self._kept_reference(b, items)
        return PairBatch(ids=b.ids, labels=b.labels, tokens=b.tokens, labelled=len(items), reference=reference)

    def margins(self, batch: PairBatch) -> Tensor:
        """What the better answer's implied reward is above the worse one's, without β: (pairs,), nats."""
        better, worse = (self.lm.logprobs(batch.ids, batch.labels) - batch.reference).chunk(2)
        return better - worse

    def loss(self, batch: PairBatch) -> Tensor:
        return -F.logsigmoid(self.beta * self.margins(batch)).sum()

    def sums(self, batch: PairBatch) -> dict[str, float]:
        """loss; margin: the mean implied reward of the better answer above the worse one's, with β, in nats;
        preferred: the share of pairs where it is above 0, a tie counting half."""
        reward = self.beta * self.margins(batch)
        preferred = (reward > 0).sum() + 0.5 * (reward == 0).sum()
        return {"loss": float(-F.logsigmoid(reward).sum()), "preferred": float(preferred),
                "margin": float(reward.sum())}  # fmt: skip

    def _kept_reference(self, batch: Batch, items: Sequence[Pair]) -> Tensor:
        """The same for pairs that are only measured, which come again in the same batches. Those of training are
        asked anew: the numbers depend on what else is in a batch, and a resumed run must find them to the bit."""
        from lora_core.registry import book_of

        others = [a.name for a in book_of(self.model).adapters.values() if a.on and a is not self.adapter]
        key = (*others, *(e.number for e in items))
        if key not in self._known:
            self._known[key] = self._reference(batch)
        return self._known[key]

    @torch.no_grad()
    def _reference(self, batch: Batch) -> Tensor:
        """log π₀ of the answers (2·pairs,)."""
        was = self.model.training
        self.model.eval()
        try:
            with self.adapter.disabled():
                return self.lm.logprobs(batch.ids, batch.labels)
        finally:
            self.model.train(was)


def worse(row: Row) -> Row:
    """The same row with its rejected answer as the completion."""
    messages = (*row.messages[:-1], ("assistant", row.rejected)) if row.messages else ()
    return replace(row, completion=row.rejected, messages=messages)
