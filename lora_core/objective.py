"""What training minimises. The loop in train.py does not know: an objective turns rows into batches and batches into
a sum of losses over so many labelled things (section 2 of the paper: the method is agnostic to the training objective).

`CausalLM` is here; classification.py and preference.py hold two more. Anything that has the methods of `Objective`
can be given to `train`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core import fast
from lora_core.adapted import Adapted
from lora_core.errors import UserError, unknown
from lora_core.tasks.encode import Encoded, encode_many

if TYPE_CHECKING:
    from lora_core.adapter import Adapter
    from lora_core.tasks import Row, Task
    from lora_core.train import TrainConfig

OBJECTIVES = ("lm", "classify", "preference")
IGNORED = -100  # the label of a token that is not trained
TOGETHER = 2  # rows of one prompt that follow each other in the order of training


@dataclass(frozen=True, kw_only=True)
class Batch:
    """ids (rows, time); labels, (rows, time) with −100 where nothing is trained, or one of each row (rows,).

    tokens    how many real ones there are, padding not counted
    labelled  how many things the loss is a sum over: tokens, texts or pairs
    """

    ids: Tensor
    labels: Tensor
    tokens: int
    labelled: int


class Objective(Protocol):
    """What the training loop and `measure` need to know of what is minimised."""

    name: str
    model: nn.Module

    def check(self, adapter: Adapter) -> None:
        """Raise UserError if this adapter cannot be trained on it."""
        ...

    def encode(self, rows: Sequence[Row]) -> Sequence[Any]:
        """One item a row; len(item) is its length in tokens, by which rows are put together."""
        ...

    def batch(self, items: Sequence[Any]) -> Batch:
        """Items on the model's device, as `loss` takes them."""
        ...

    def loss(self, batch: Any) -> Tensor:
        """Sum of the losses of the batch's labelled things, in nats, at least float32."""
        ...

    def sums(self, batch: Any) -> dict[str, float]:
        """{figure: its sum over the labelled things}, "loss" among them; no gradient is needed."""
        ...


@runtime_checkable
class SharesPrompts(Protocol):
    """An objective that computes what rows of a batch have in common at their beginning once."""

    def alike(self, items: Sequence[Any]) -> Sequence[Hashable] | None:
        """A value of each item that those with the same prompt share; None where nothing would be gained."""
        ...


class CausalLM:
    """−log p(completion | prompt), summed over the completion's tokens and the end of text.

    Three things make it cheap. Rows are padded on the right, where causal attention never looks, so no mask is needed.
    Logits are computed only where there is a label: the vocabulary is the widest matrix of a small model. That is
    done by calling the model's body and its head apart, and only for models where a probe shows that this is the same.
    And bodies like LLaMA's are computed by fast.py.
    """

    name = "lm"

    def __init__(self, model: nn.Module, tokenizer: Any, template: str, max_tokens: int = 256) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        self.max_tokens = min(max_tokens, longest) if isinstance(longest, int) else max_tokens
        self.device = next(model.parameters()).device
        self.fast = fast.body(model)
        self.split = self._splits()

    def check(self, adapter: Adapter) -> None:
        """UserError for a model that has no head over the vocabulary."""
        if getattr(self.model, "get_output_embeddings", lambda: None)() is None:
            raise UserError(
                f"{type(self.model).__name__} writes no text, so that it cannot be trained to; for a classifier "
                'load it with load_model(name, labels=("negative", "positive")) and train(…, objective="classify")'
            )

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        return encode_many(self.tokenizer, rows, self.template, self.max_tokens)

    def batch(self, items: Sequence[Encoded]) -> Batch:
        """Rows of one length, the shorter ones filled up on the right."""
        longest = max(map(len, items))
        ids = torch.empty(len(items), longest, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for i, e in enumerate(items):
            n = len(e.ids)
            row = torch.tensor(e.ids)
            ids[i, :n] = row
            ids[i, n:] = row[-1]  # any token will do: nothing attends to it
            labels[i, e.start : n] = row[e.start :]
        return Batch(ids=ids.to(self.device), labels=labels.to(self.device), tokens=sum(map(len, items)),
                     labelled=int((labels[:, 1:] != IGNORED).sum()))  # fmt: skip

    def alike(self, items: Sequence[Encoded]) -> list[tuple[int, ...]] | None:
        """The tokens of each prompt, where the body computes those of several rows once."""
        return [tuple(e.ids[: e.start]) for e in items] if self.fast else None

    def loss(self, batch: Batch) -> Tensor:
        """Sum of the losses of a batch's labelled tokens, at least float32, nats."""
        targets = batch.labels[:, 1:].reshape(-1)
        at = (targets != IGNORED).nonzero().squeeze(1)
        if self.split:
            head = cast(Any, self.model).get_output_embeddings()
            return self._head_loss(head, self._hidden(batch.ids, at), targets[at])
        return F.cross_entropy(wide(self.logits(batch.ids, at)), targets[at], reduction="sum")

    def losses(self, batch: Batch, parts: int) -> list[Tensor]:
        """The same for each of so many equal parts of the batch's rows, which hold as many labels each."""
        targets = batch.labels[:, 1:].reshape(-1)
        at = (targets != IGNORED).nonzero().squeeze(1)
        if not self.split:
            each = self.logits(batch.ids, at).chunk(parts)
            return [F.cross_entropy(wide(x), t, reduction="sum") for x, t in zip(each, targets[at].chunk(parts))]
        head = cast(Any, self.model).get_output_embeddings()
        if Adapted in type(head).__mro__:  # its rows are those of the whole batch
            each = head(self._hidden(batch.ids, at)).chunk(parts)
            return [F.cross_entropy(wide(x), t, reduction="sum") for x, t in zip(each, targets[at].chunk(parts))]
        pairs = zip(self._hidden(batch.ids, at).chunk(parts), targets[at].chunk(parts), strict=True)
        return [self._head_loss(head, h, t) for h, t in pairs]

    def sums(self, batch: Batch) -> dict[str, float]:
        return {"loss": float(self.loss(batch))}

    def logprobs(self, ids: Tensor, labels: Tensor) -> Tensor:
        """log p of each row's labelled tokens given what is before them, summed: (rows,), nats, at least float32."""
        targets = labels[:, 1:]
        trained = targets != IGNORED
        logits = self.logits(ids, trained.reshape(-1).nonzero().squeeze(1))
        each = wide(logits).log_softmax(-1).gather(1, targets[trained][:, None]).squeeze(1)
        return each.new_zeros(targets.shape).masked_scatter(trained, each).sum(1)

    def logits(self, ids: Tensor, at: Tensor) -> Tensor:
        """Logits (len(at), vocabulary) that predict the token after position at[i] of ids[:, :-1], flattened."""
        if self.split:
            return cast(Any, self.model).get_output_embeddings()(self._hidden(ids, at))
        out = cast(Any, self.model)(input_ids=ids, use_cache=False).logits[:, :-1]
        return out.reshape(-1, out.shape[-1])[at]

    @staticmethod
    def _head_loss(head: nn.Module, h: Tensor, targets: Tensor) -> Tensor:
        loss = fast.loss_of(head, h, targets)
        return F.cross_entropy(wide(head(h)), targets, reduction="sum") if loss is None else loss

    def _hidden(self, ids: Tensor, at: Tensor) -> Tensor:
        return self.fast(ids[:, :-1], at) if self.fast else self._body(ids)[:, :-1].flatten(0, 1)[at]

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


def is_classifier(model: nn.Module) -> bool:
    """Whether it is one of transformers' …ForSequenceClassification."""
    return type(model).__name__.endswith("ForSequenceClassification")


def choose(reads_only: bool, rows: Sequence[Row]) -> str:
    """The objective that fits: "classify" for a model that writes no text, "preference" for rows with a rejected
    answer, else "lm"."""
    return "classify" if reads_only else "preference" if any(r.rejected for r in rows) else "lm"


def objective_for(
    wanted: Objective | str | None, adapter: Adapter, task: Task, tokenizer: Any, config: TrainConfig
) -> Objective:
    """The objective of that name for an adapter's model and a task; None chooses (see `choose`), an object is kept.

    Raises UserError for an unknown name, and for a task or a model that the objective does not fit.
    """
    if wanted is not None and not isinstance(wanted, str):
        return wanted
    from lora_core.classification import Classification, labels_for
    from lora_core.preference import Preference

    model = adapter.model
    if wanted is None:
        writes = getattr(model, "get_output_embeddings", lambda: None)() is not None
        wanted = choose(is_classifier(model) or not writes, task.train)
    if wanted == "lm":
        return CausalLM(model, tokenizer, task.template, config.max_tokens)
    if wanted == "preference":
        return Preference(adapter, tokenizer, task.template, config.max_tokens, beta=config.beta)
    if wanted == "classify":
        return Classification(model, tokenizer, labels_for(model, task), config.max_tokens)
    raise unknown("objective", wanted, OBJECTIVES)


def wide(x: Tensor) -> Tensor:
    """16-bit numbers as float32; a softmax over a vocabulary needs it. Others as they are."""
    return x.float() if x.element_size() < 4 else x


def bucketed(lengths: Sequence[int], size: int, generator: torch.Generator, window: int = 32,
             alike: Sequence[Hashable] | None = None) -> list[list[int]]:  # fmt: skip
    """One epoch of batches of indices: shuffled, then sorted by length within windows, so that little is padding.

    A window holds `window` batches; the batches' order is shuffled again. A last batch that is not full is dropped
    when there are others. alike: rows of which these values are equal begin alike, and come `TOGETHER` at a time, so
    that their beginning is computed once for all of these.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    units = [[i] for i in order]
    if alike is not None:
        same: dict[Hashable, list[int]] = {}
        for i in order:
            same.setdefault(alike[i], []).append(i)
        units = [v[k : k + TOGETHER] for v in same.values() for k in range(0, len(v), TOGETHER)]
        units = [units[k] for k in torch.randperm(len(units), generator=generator).tolist()]
    per = max(1, round(size * window * len(units) / max(1, len(order))))
    batches = []
    for i in range(0, len(units), per):
        part = sorted(units[i : i + per], key=lambda u: max(lengths[j] for j in u))
        rows = [j for u in part for j in u]
        batches += [rows[k : k + size] for k in range(0, len(rows), size)]
    if len(batches) > 1:
        batches = [b for b in batches if len(b) == size] or batches
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def endless(lengths: Sequence[int], size: int, seed: int, alike: Sequence[Hashable] | None = None
            ) -> Iterator[list[int]]:  # fmt: skip
    """Batches of indices, epoch after epoch, each epoch's order drawn from (seed, epoch)."""
    epoch = 0
    while True:
        yield from bucketed(lengths, size, torch.Generator().manual_seed(seed * 1_000_003 + epoch), alike=alike)
        epoch += 1


def batches_of(objective: Objective, items: Sequence[Any], size: int, seed: int) -> Iterator[list[int]]:
    """The order in which an objective's items are trained on, without end."""
    alike = objective.alike(items) if isinstance(objective, SharesPrompts) else None
    return endless([len(e) for e in items], size, seed, alike)
