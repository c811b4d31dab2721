"""Sequence classification: a text in, one of a few labels out, on a model with a classification head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core import fast_encoder
from lora_core.errors import UserError, unknown
from lora_core.objective import Batch, is_classifier, wide
from lora_core.tasks.task import labels_of

if TYPE_CHECKING:
    from lora_core.adapter import Adapter
    from lora_core.tasks import Row, Task

WRITE = 'load_model(name, labels=("negative", "positive"))'


@dataclass(frozen=True, slots=True)
class Labelled:
    """One text as tokens with the model's special ones, and the number of its label; `cut`: it was too long."""

    ids: list[int]
    label: int
    cut: bool

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, kw_only=True)
class TextBatch(Batch):
    """mask (rows, time): 1 where a token is real."""

    mask: Tensor


class Classification:
    """−log p(label | text), summed over the texts; p is the softmax over the logits of the model's head.

    model       one of transformers' …ForSequenceClassification; `load_model(name, labels=…)` gives one
    labels      their names in the order of the logits; None for those in the model's config
    max_tokens  longer texts lose their end

    A text is read as the tokenizer gives it, with its special tokens and without a template. A decoder's head reads
    the last token that is not padding, so that the model's config must name its padding token. Raises UserError for
    a model that is no classifier, and for other than as many labels as it has logits.
    """

    name = "classify"

    def __init__(
        self, model: nn.Module, tokenizer: Any, labels: Sequence[str] | None = None, max_tokens: int = 256
    ) -> None:
        names = model_labels(model)
        self.model, self.tokenizer = model, tokenizer
        self.labels = tuple(labels) if labels is not None else names
        if len(self.labels) != len(names):
            raise UserError(f"{len(self.labels)} labels for a model that tells {len(names)} apart; give as many")
        config = cast(Any, model).config
        if config.pad_token_id is None:
            raise UserError(
                "the model's config names no padding token, by which the end of a text is found: "
                "set model.config.pad_token_id = tokenizer.pad_token_id"
            )
        self.pad: int = config.pad_token_id
        positions = getattr(config, "max_position_embeddings", None) or max_tokens
        self.max_tokens = min(max_tokens, positions, tokenizer.model_max_length)
        self.device = next(model.parameters()).device

    def check(self, adapter: Adapter) -> None:
        """UserError where parameters were drawn at random when the model was loaded and would stay as they are."""
        drawn = getattr(getattr(self.model, "lora_lab", None), "drawn", ())
        left = [n for n in drawn if n not in adapter.copies]
        if not left:
            return
        full = tuple(dict.fromkeys([*adapter.spec.full, *drawn_modules(self.model)]))
        raise UserError(
            f"{left[0]} was drawn at random and is not trained, so that its labels would mean nothing; "
            f"write LoraSpec(…, full={full!r})"
        )

    def encode(self, rows: Sequence[Row]) -> list[Labelled]:
        """Raises UserError for a row without a text, or with a label that is none of the model's."""
        number = {name: i for i, name in enumerate(self.labels)}
        for row in rows:
            where = f"line {row.line}: " if row.line else ""
            if not row.prompt:
                raise UserError(f"{where}a text and a label are needed, this row is text alone")
            if row.completion not in number:
                raise UserError(f"{where}{unknown('label', row.completion, self.labels, 'in this model')}")
        return [Labelled(ids, number[row.completion], cut)
                for row, (ids, cut) in zip(rows, self._read([row.prompt for row in rows]))]  # fmt: skip

    def batch(self, items: Sequence[Labelled]) -> TextBatch:
        ids, mask = self._padded([e.ids for e in items])
        labels = torch.tensor([e.label for e in items], device=self.device)
        return TextBatch(ids=ids, mask=mask, labels=labels, tokens=sum(map(len, items)), labelled=len(items))

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(rows, labels), at least float32."""
        return wide(fast_encoder.logits(self.model, ids, mask))

    def loss(self, batch: TextBatch) -> Tensor:
        return F.cross_entropy(self.logits(batch.ids, batch.mask), batch.labels, reduction="sum")

    def losses(self, batch: TextBatch, parts: int) -> list[Tensor]:
        """The loss of each of so many equal parts of the batch's rows."""
        pairs = zip(self.logits(batch.ids, batch.mask).chunk(parts), batch.labels.chunk(parts), strict=True)
        return [F.cross_entropy(x, y, reduction="sum") for x, y in pairs]

    def sums(self, batch: TextBatch) -> dict[str, float]:
        """loss, and accuracy: the share of texts whose likeliest label is theirs."""
        logits = self.logits(batch.ids, batch.mask)
        right = (logits.argmax(-1) == batch.labels).sum()
        return {"loss": float(F.cross_entropy(logits, batch.labels, reduction="sum")), "accuracy": float(right)}

    @torch.no_grad()
    def predict(self, texts: Sequence[str], rows: int = 16) -> list[tuple[str, float]]:
        """(likeliest label, its probability) of each text."""
        found: list[tuple[str, float]] = []
        was = self.model.training
        self.model.eval()
        try:
            read = [ids for ids, _ in self._read(texts)]
            for i in range(0, len(read), rows):
                p, at = self.logits(*self._padded(read[i : i + rows])).softmax(-1).max(-1)
                found += [(self.labels[k], v) for k, v in zip(at.tolist(), p.tolist(), strict=True)]
        finally:
            self.model.train(was)
        return found

    def _read(self, texts: Sequence[str]) -> list[tuple[list[int], bool]]:
        """(tokens, whether some were cut) of each text."""
        if not texts:
            return []
        whole = self.tokenizer(list(texts), verbose=False)["input_ids"]
        cut = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens)["input_ids"]
        return [(c, len(c) < len(w)) for c, w in zip(cut, whole, strict=True)]

    def _padded(self, texts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """ids and mask (rows, time), the shorter texts filled up on the right."""
        longest = max(map(len, texts))
        ids = torch.tensor([t + [self.pad] * (longest - len(t)) for t in texts], device=self.device)
        mask = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in texts], device=self.device)
        return ids, mask


def drawn_modules(model: nn.Module) -> tuple[str, ...]:
    """What `LoraSpec.full` has to name so that whatever was drawn at random when the model was loaded is trained."""
    drawn = getattr(getattr(model, "lora_lab", None), "drawn", ())
    body = f"{cast(Any, model).base_model_prefix}."
    inside = sorted({n.rpartition(".")[0] for n in drawn if n.startswith(body)})
    return (("head",) if any(not n.startswith(body) for n in drawn) else ()) + tuple(inside)


def model_labels(model: nn.Module) -> tuple[str, ...]:
    """The names of a classifier's labels in the order of its logits; UserError for any other model."""
    if not is_classifier(model):
        raise UserError(f"{type(model).__name__} has no head for labels; load it with {WRITE}")
    names = cast(Any, model).config.id2label
    return tuple(str(names[i]) for i in range(len(names)))


def labels_for(model: nn.Module, task: Task) -> tuple[str, ...]:
    """The model's labels where the task's are among them, else the task's, for a model whose labels have no names.

    Raises UserError where the two do not fit.
    """
    names, wanted = model_labels(model), labels_of(task)
    if set(wanted) <= set(names):
        return names
    if len(names) == len(wanted) and names == tuple(f"LABEL_{i}" for i in range(len(names))):
        return wanted
    raise UserError(
        f"the labels of {task.name!r} are {', '.join(wanted)}, those of the model {', '.join(names)}; "
        f"load the model with labels={wanted!r}"
    )
