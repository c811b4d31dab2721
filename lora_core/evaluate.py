"""What an adapter changed: loss, accuracy and preferences, the task's score, and the words whose probability moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_core.objective import CausalLM, Objective, wide

if TYPE_CHECKING:
    from lora_core.tasks import Row, Task

ROWS, ROWS_GPU = 16, 64  # in one forward pass


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Mean loss over the completions' tokens, in nats a token; perplexity is e to that; what it was measured on."""

    loss: float
    perplexity: float
    tokens: int
    rows: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TokenDiff:
    """One token of a text, with log p of it (nats) before and after, and the likeliest (text, p) of both there.

    kl  Σ p'·log(p'/p) over the whole vocabulary, in nats: how far the adapted model's distribution p' of this token is
        from the base's p, whichever token stands there
    """

    text: str
    base_logprob: float
    adapted_logprob: float
    base_top: tuple[tuple[str, float], ...]
    adapted_top: tuple[tuple[str, float], ...]
    kl: float = math.nan

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def spread(rows: Sequence[Row], most: int) -> list[Row]:
    """At most so many rows, evenly spaced: the first ones of a file are often about one thing."""
    if len(rows) <= most:
        return list(rows)
    return [rows[i * len(rows) // most] for i in range(most)]


@contextmanager
def only(model: nn.Module, name: str | None) -> Iterator[None]:
    """Within the block the model computes with that adapter alone, or as the base model."""
    from lora_core.registry import book_of, get_adapter

    if name is not None:
        get_adapter(model, name)
    with ExitStack() as stack:
        for a in book_of(model).adapters.values():
            if a.name != name:
                stack.enter_context(a.disabled())
            elif not a.on:
                a.enable()
                stack.callback(a.enable, False)
        yield


@torch.no_grad()
def mean_loss(objective: Objective, items: Sequence[Any], rows: int = ROWS) -> float | None:
    """Mean loss over what encoded rows label; None without rows. Rows of like length go together."""
    if not items:
        return None
    total, count = 0.0, 0
    for part in portions(objective, items, rows):
        batch = objective.batch(part)
        total += float(objective.loss(batch))
        count += batch.labelled
    return total / max(1, count)


def portions(objective: Objective, items: Sequence[Any], rows: int = ROWS) -> Iterator[Sequence[Any]]:
    """Items of like length, so many at a time, with the model in evaluation mode while they are used."""
    was = objective.model.training
    if next(objective.model.parameters()).device.type == "cuda":
        rows = max(rows, ROWS_GPU)
    objective.model.eval()
    try:
        ordered = sorted(items, key=len)
        for i in range(0, len(ordered), rows):
            yield ordered[i : i + rows]
    finally:
        objective.model.train(was)


@torch.no_grad()
def measure(objective: Objective, rows: Sequence[Row], *, adapters: Sequence[str | None] = (None,),
            stop: Callable[[], bool] | None = None) -> dict[str | None, dict[str, float]]:  # fmt: skip
    """{adapter name, or None for the base: {figure: its mean over what the rows label}}.

    The figures are the objective's: "loss" of all three, in nats; "accuracy" of a `Classification`, a share;
    "preferred" of a `Preference`, the share of pairs where the implied reward β·log(π/π₀) of the better answer is the
    higher one (a tie counts half, so that the base has 0.5), and "margin", the mean of that difference in nats.
    stop: asked before every batch; True ends it, with {} for what was not measured to its end.
    """
    items = objective.encode(rows)
    out: dict[str | None, dict[str, float]] = {}
    for name in adapters:
        total: dict[str, float] = {}
        count = 0
        with only(objective.model, name):
            for part in portions(objective, items):
                batch = objective.batch(part)
                if stop is not None and stop():
                    count = 0
                    break
                for figure, value in objective.sums(batch).items():
                    total[figure] = total.get(figure, 0.0) + value
                count += batch.labelled
        out[name] = {figure: value / count for figure, value in total.items()} if count else {}
    return out


def evaluate(model: nn.Module, tokenizer: Any, rows: Sequence[Row], *, template: str = "{prompt} ->",
             adapters: Sequence[str | None] = (None,), max_tokens: int = 256) -> dict[str | None, Loss]:  # fmt: skip
    """{adapter name, or None for the base: Loss} over the completions of rows (as in training)."""
    objective = CausalLM(model, tokenizer, template, max_tokens)
    items = objective.encode(rows)
    labelled = sum(len(e) - e.start for e in items)
    out: dict[str | None, Loss] = {}
    for name in adapters:
        with only(model, name):
            loss = mean_loss(objective, items)
        value = math.nan if loss is None else loss
        out[name] = Loss(loss=value, perplexity=math.exp(min(value, 700.0)), tokens=labelled, rows=len(items))
    return out


def score(model: nn.Module, tokenizer: Any, task: Task, *, adapters: Sequence[str | None] = (None,), limit: int = 32,
          stop: Callable[[], bool] | None = None) -> dict[str | None, dict[str, float]]:  # fmt: skip
    """{adapter: {score's name: value}} from greedy completions of at most `limit` held-out prompts, in one batch.

    Empty for a task that has no score.
    """
    from lora_core.generate import generate
    from lora_core.tasks import prompt_text

    rows = task.score_rows(limit)
    if not rows:
        return {name: {} for name in adapters}
    prompts = [prompt_text(tokenizer, r, task.template) for r in rows]
    new = int(task.suggested.get("max_new_tokens", 64))
    *_, last = generate(model, tokenizer, prompts, adapters=adapters, stop=stop, max_new_tokens=new)
    return {name: task.score([t[j].strip() for t in last.texts], rows) for j, name in enumerate(adapters)}


def token_differences(model: nn.Module, tokenizer: Any, prompt: str, completion: str, name: str, *,
                      template: str = "{prompt} ->", top: int = 3) -> list[TokenDiff]:  # fmt: skip
    """How the adapter moved the probability of each token of a completion; [] for an empty one.

    Both models read the same text in one batch: prompt in its template, then the completion.
    """
    from lora_core.tasks import Row
    from lora_core.tasks.encode import encode

    if not completion.strip():
        return []
    objective = CausalLM(model, tokenizer, template)
    e = encode(tokenizer, Row(prompt, completion.strip()), template, objective.max_tokens)
    ids = e.ids[:-1] if e.ids[-1] == tokenizer.eos_token_id else e.ids  # the end of text is no word
    return _differences(objective, ids, e.start, name, top)


def text_differences(model: nn.Module, tokenizer: Any, text: str, name: str, *, top: int = 3,
                     max_tokens: int = 256) -> list[TokenDiff]:  # fmt: skip
    """The same for any text as it stands, without a prompt or a template; at most so many tokens of it.

    Its first token has nothing before it that would make it likely, unless the tokenizer puts a begin-of-text token
    there: else it is left out. [] for a text of one token or none.
    """
    objective = CausalLM(model, tokenizer, "{prompt}", max_tokens)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    head = list(tokenizer("", add_special_tokens=True)["input_ids"])
    begin = head[:1] if head[:1] == [tokenizer.bos_token_id] else []
    return _differences(objective, (begin + ids)[: objective.max_tokens], 1, name, top)


@torch.no_grad()
def _differences(objective: CausalLM, ids: list[int], start: int, name: str, top: int) -> list[TokenDiff]:
    """Of the tokens ids[start:], each given all before it."""
    from lora_core.adapter import rows as per_row

    model, tokenizer, n = objective.model, objective.tokenizer, len(ids) - start
    if n <= 0:
        return []
    both = torch.tensor([ids, ids], device=objective.device)
    at = torch.cat([torch.arange(start - 1, len(ids) - 1) + row * (len(ids) - 1) for row in (0, 1)]).to(
        objective.device
    )
    was = model.training
    model.eval()
    try:
        with per_row(model, [None, name]):
            logp = wide(objective.logits(both, at)).log_softmax(-1).view(2, n, -1)
    finally:
        model.train(was)
    texts = pieces(tokenizer, ids[start:])
    best = logp.topk(min(top, logp.shape[-1]), dim=-1)
    kl = (logp[1].exp() * (logp[1] - logp[0])).nan_to_num().sum(-1).clamp_min(0).tolist()

    def tops(side: int, i: int) -> tuple[tuple[str, float], ...]:
        values: Tensor = best.values[side, i].exp()
        return tuple(
            (tokenizer.decode([t]), p) for t, p in zip(best.indices[side, i].tolist(), values.tolist(), strict=True)
        )

    return [TokenDiff(text=texts[i], base_logprob=float(logp[0, i, t]), adapted_logprob=float(logp[1, i, t]),
                      base_top=tops(0, i), adapted_top=tops(1, i), kl=kl[i])
            for i, t in enumerate(ids[start:])]  # fmt: skip


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token. Tokens that are parts of one character give it all to the last of them."""
    out, done = [], ""
    for i in range(len(ids)):
        text = tokenizer.decode(ids[: i + 1])
        whole = text if not text.endswith("\ufffd") else done
        out.append(whole[len(done) :])
        done = whole
    return out
