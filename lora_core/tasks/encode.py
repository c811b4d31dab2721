"""Rows to tokens: what is put before the completion, what is trained, and what is cut when a row is too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_core.errors import UserError
from lora_core.tasks.task import CHAT, Note, Row, Task

MOST_TOKENS = 256  # of one row, as TrainConfig has it
WINDOW = 24  # tokens that are decoded once more with each new one


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of one row. `ids[start:]` is what is trained: the completion and the end-of-text token.

    `start` is at least 1, since a first token has nothing before it that could predict it. `cut`: it was too long.
    """

    ids: list[int]
    start: int
    cut: bool

    def __len__(self) -> int:
        return len(self.ids)


def check_template(template: str) -> str:
    """The template itself; UserError unless it holds `{prompt}` exactly once or is `{messages}`."""
    if not isinstance(template, str):
        raise UserError(f"the template is {template!r}; it is a text with {{prompt}} in it")
    if template != CHAT and template.count("{prompt}") != 1:
        raise UserError(
            f"the template {template!r} must hold {{prompt}} once, as in '{{prompt}} ->',"
            f" or be {CHAT}, which means the model's chat template"
        )
    return template


def prompt_text(tokenizer: Any, prompt: str | Row, template: str) -> str:
    """The text that stands before the completion, which is what `generate` should be given for a prompt of the task.

    Only the letters `{prompt}` of the template are replaced: braces in the prompt or elsewhere mean nothing.
    """
    row = prompt if isinstance(prompt, Row) else Row(prompt, "")
    if row.messages or template == CHAT:
        return _chat(tokenizer, _conversation(row)[:-1], more=True)
    return check_template(template).replace("{prompt}", row.prompt)


def encode(tokenizer: Any, row: Row, template: str, max_tokens: int = MOST_TOKENS) -> Encoded:
    """The tokens of `row`, at most `max_tokens`.

    They are those of the template with the prompt, then those of " " + completion, then end of text; the two are
    tokenised apart, so that the border between them is where generation starts too. A row without a prompt is its
    text and end of text. A row of messages goes through the tokenizer's chat template, and its last message is
    trained. A row that is too long loses the beginning of its prompt; if its completion alone is too long, that
    loses its end. Raises UserError for an empty completion or a tokenizer without end of text.
    """
    return encode_many(tokenizer, [row], template, max_tokens)[0]


def encode_many(tokenizer: Any, rows: Sequence[Row], template: str, max_tokens: int = MOST_TOKENS) -> list[Encoded]:
    """`encode` for many rows in one call of the tokenizer, which is about ten times as fast."""
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 2:
        raise UserError(f"max_tokens is {max_tokens!r}; a row needs at least 2 tokens")
    check_template(template)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError("this tokenizer has no end-of-text token, so completions would have no end")
    texts = [_texts(tokenizer, row, template) for row in rows]
    known = list(dict.fromkeys(text for pair in texts for text in pair if text))  # prompts often occur many times
    ids = dict(zip(known, _ids(tokenizer, known), strict=True))
    return [_fit(ids.get(before, []), _ended(ids[after], eos), max_tokens) for before, after in texts]


def _texts(tokenizer: Any, row: Row, template: str) -> tuple[str, str]:
    """What is given and what is trained, as texts; the end-of-text token comes later."""
    if not row.completion.strip():
        raise UserError(f"line {row.line}: the completion is empty" if row.line else "the completion is empty")
    if row.messages or (template == CHAT and row.prompt):
        before = prompt_text(tokenizer, row, template)
        whole = _chat(tokenizer, _conversation(row), more=False)
        if whole.startswith(before) and whole[len(before) :].strip():
            return before, whole[len(before) :].rstrip()
        # Some chat templates drop or move things of earlier turns: then the reply follows as it is.
        return before, row.completion
    if not row.prompt:
        return "", row.completion
    return prompt_text(tokenizer, row, template), " " + row.completion


def _conversation(row: Row) -> list[dict[str, str]]:
    messages = row.messages or (("user", row.prompt), ("assistant", row.completion))
    return [{"role": role, "content": content} for role, content in messages]


def _chat(tokenizer: Any, messages: list[dict[str, str]], *, more: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "this model has no chat template, so rows of messages cannot be used with it;"
            " use prompt and completion, or an instruct model"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=more)
    except UserError:
        raise
    except Exception as error:  # jinja2 errors: templates raise them for roles or orders that they do not take
        why = " ".join(str(error).split())[:200]
        raise UserError(f"the model's chat template does not take this conversation: {why}") from error


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """verbose=False: a text longer than the model's context is cut here, so its warning would mislead."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _ended(ids: list[int], eos: int) -> list[int]:
    return ids if ids and ids[-1] == eos else [*ids, eos]  # a chat template may have written it already


def _fit(before: list[int], after: list[int], most: int) -> Encoded:
    """`before` loses its beginning, down to one token; then `after` loses its end."""
    cut = len(before) + len(after) > most
    if cut and before:
        before = before[-max(1, most - len(after)) :]
    after = after[: most - len(before)]
    return Encoded(before + after, max(1, len(before)), cut)


def cut_notes(
    tokenizer: Any, rows: Sequence[Row], template: str, max_tokens: int = MOST_TOKENS, file: str = ""
) -> tuple[Note, ...]:
    """A Note for every row that is longer than `max_tokens`."""
    why = f"is longer than {max_tokens:,} tokens and was cut"
    encoded = [encode_many(tokenizer, rows, template, max_tokens)]
    if any(row.rejected for row in rows):
        other = [replace(row, completion=row.rejected or row.completion, messages=()) for row in rows]
        encoded.append(encode_many(tokenizer, other, template, max_tokens))
    return tuple(Note(line=row.line, why=why, kind="cut", file=file)
                 for row, *items in zip(rows, *encoded, strict=True) if any(e.cut for e in items))  # fmt: skip


def preview(task: Task, tokenizer: Any, n: int = 8, max_tokens: int = MOST_TOKENS) -> list[dict[str, Any]]:
    """`n` training rows as the model sees them, one of each prompt: {line, pieces: [{text, trained}], tokens, cut}.

    A piece is one token's text, or several tokens' when a character is spread over them (byte-level BPE does that).
    The pieces of a row joined are the text that is trained on.
    """
    first: dict[str, Row] = {}
    for row in task.train or task.test:
        if len(first) >= n:
            break
        first.setdefault(row.key, row)
    rows = list(first.values())
    encoded = encode_many(tokenizer, rows, task.template, max_tokens)
    return [
        {"line": row.line, "pieces": pieces(tokenizer, e.ids, e.start), "tokens": len(e.ids), "cut": e.cut}
        for row, e in zip(rows, encoded, strict=True)
    ]


def pieces(tokenizer: Any, ids: Sequence[int], start: int) -> list[dict[str, Any]]:
    """Texts of the tokens `ids`, those from `start` on marked as trained; whole characters only."""
    found: list[dict[str, Any]] = []
    for part, trained in ((ids[:start], False), (ids[start:], True)):
        # Decoding goes back a few tokens, since some tokenizers drop the space before a token on its own; not to the
        # start, which would take a long text's time squared.
        begin = last = 0
        before = ""
        for i in range(1, len(part) + 1):
            now = tokenizer.decode(part[begin:i], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            whole = now.startswith(before) and not now.endswith("\ufffd")
            if (whole or i == len(part)) and now != before:
                found.append({"text": now[len(before) :], "trained": trained})
                if last > begin and i - begin > WINDOW:
                    begin = last
                    now = tokenizer.decode(part[begin:i], skip_special_tokens=False, clean_up_tokenization_spaces=False)
                before, last = now, i
    return found
