"""Text from several adapters at once: one batch, in which each row is computed with its own, streamed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_core.adapted import few_rows
from lora_core.adapter import rows as per_row
from lora_core.errors import UserError
from lora_core.fast import decoder

Ahead = Callable[[Tensor, Tensor], Tensor]  # ids (rows, n) that come next, mask (rows, all so far) -> the next's logits


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The texts so far: texts[i][j] is the completion of prompt i by adapters[j]. `done` on the last one.

    tokens   new tokens so far, of all rows together
    seconds  since the call; first_s: until the first token
    """

    texts: tuple[tuple[str, ...], ...]
    adapters: tuple[str | None, ...]
    tokens: int
    done: bool
    seconds: float
    first_s: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str] | str,
    adapters: Sequence[str | None] = (None,),
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Callable[[], bool] | None = None,
) -> Iterator[Generation]:
    """Continue every prompt with every adapter (None: the base model); one event a token, the last with done=True.

    prompts are given to the model as they stand: `tasks.prompt_text` puts one into a task's template.
    temperature 0 takes the likeliest token; above it, draws from the smallest set of tokens that holds top_p.
    Raises UserError for an empty prompt, one longer than the model's context, or an adapter that is not attached.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    adapters = tuple(adapters)
    _check(prompts, adapters, max_new_tokens, temperature, top_p)
    began = time.perf_counter()
    encoded = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = max(map(len, encoded))
    if not all(encoded):
        raise UserError("a prompt is empty: there is nothing to continue")
    if isinstance(context, int) and longest + 1 > context:
        raise UserError(f"a prompt has {longest:,} tokens; this model reads at most {context - 1:,}")
    if isinstance(context, int):
        max_new_tokens = min(max_new_tokens, context - longest)
    device = next(model.parameters()).device
    sides = len(adapters)
    rows = [ids for ids in encoded for _ in adapters]  # prompt by prompt, the adapters of one side by side
    names = [a for _ in encoded for a in adapters]
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(rows), longest), filler)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, r in enumerate(rows):
        ids[i, longest - len(r) :] = torch.tensor(r)
        mask[i, longest - len(r) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    ends = _ends(model, tokenizer)
    generator = torch.Generator(device).manual_seed(seed)
    new: list[list[int]] = [[] for _ in rows]
    live = torch.ones(len(rows), dtype=torch.bool)
    total, first_s = 0, 0.0
    with per_row(model, names):  # what acts then decides whether the quick way is open
        ahead: Ahead = decoder(model, len(rows), longest + max_new_tokens) or _Plain(model)
    texts, quick = _Texts(tokenizer, len(rows)), few_rows(model)
    was = model.training
    model.eval()
    try:
        for n in range(max_new_tokens):
            with torch.no_grad(), per_row(model, names), quick:
                token = _pick(ahead(ids, mask).float(), temperature, top_p, generator).cpu()
            for i, t in enumerate(token.tolist()):
                if live[i]:
                    total += 1
                    if t in ends:
                        live[i] = False
                    else:
                        new[i].append(t)
            first_s = first_s or time.perf_counter() - began
            done = not live.any() or n + 1 == max_new_tokens or bool(stop and stop())
            so_far = texts.update(new, done)
            grouped = tuple(tuple(so_far[i : i + sides]) for i in range(0, len(rows), sides))
            yield Generation(texts=grouped, adapters=adapters, tokens=total, done=done,
                             seconds=time.perf_counter() - began, first_s=first_s)  # fmt: skip
            if done:
                return
            ids = token[:, None].to(device)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    finally:
        model.train(was)


class _Texts:
    """Decodes as tokens come: only the new ones, from the last point where the text was whole."""

    def __init__(self, tokenizer: Any, rows: int) -> None:
        self.tokenizer = tokenizer
        self.text, self.start, self.at = [""] * rows, [0] * rows, [0] * rows

    def update(self, new: list[list[int]], last: bool) -> list[str]:
        for i, ids in enumerate(new):
            before = self.tokenizer.decode(ids[self.start[i] : self.at[i]])
            now = self.tokenizer.decode(ids[self.start[i] :])
            if last or not now.endswith("\ufffd"):  # half a character waits for its other half
                self.text[i] += now[len(before) :]
                self.start[i], self.at[i] = self.at[i], len(ids)
        return list(self.text)


class _Plain:
    """What fast.Decoder does, for any model."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.cache = model, None

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        position = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        out = cast(Any, self.model)(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True,
                                    past_key_values=self.cache, **_last_only(self.model))  # fmt: skip
        self.cache = out.past_key_values
        return out.logits[:, -1]


def _last_only(model: nn.Module) -> dict[str, Any]:
    """Ask for the logits of the last position alone, where the model can."""
    import inspect

    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _ends(model: nn.Module, tokenizer: Any) -> set[int]:
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return {int(t) for t in (*ends, tokenizer.eos_token_id) if t is not None}


def _pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """The next token of each row (rows,) from logits (rows, vocabulary)."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits / temperature).softmax(-1)
    if top_p < 1:
        values, order = p.sort(-1, descending=True)
        values = values.masked_fill(values.cumsum(-1) - values >= top_p, 0)  # the first is always kept
        p = torch.zeros_like(p).scatter_(-1, order, values)
    return torch.multinomial(p, 1, generator=generator).squeeze(1)


def _check(
    prompts: list[str], adapters: tuple[str | None, ...], max_new_tokens: int, temperature: float, top_p: float
) -> None:
    if not prompts or not adapters:
        raise UserError("nothing to generate: give at least one prompt and one adapter (None is the base model)")
    if not 1 <= max_new_tokens <= 100_000:
        raise UserError(f"max_new_tokens is {max_new_tokens!r}; it must be from 1 to 100,000")
    if not 0 <= temperature <= 100:
        raise UserError(f"temperature is {temperature!r}; it must be from 0 (always the likeliest token) to 100")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p!r}; it must be above 0 and at most 1")
