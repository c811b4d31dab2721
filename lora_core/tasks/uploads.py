"""The user's file or rows -> a Task: what is held out, what the score is, what was cut."""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_core.errors import UserError, unknown
from lora_core.tasks.data_files import Content, read_rows
from lora_core.tasks.encode import MOST_TOKENS, check_template, cut_notes
from lora_core.tasks.records import records
from lora_core.tasks.scores import score_answers, score_labels, score_nothing, score_pairs, score_sentences
from lora_core.tasks.task import CHAT, TEMPLATE, Note, Row, Scorer, Task

SHARE = 0.1  # of the rows is held out when there is no file for it
MOST_PROMPTS = 128  # held out; each of them is generated for when the score is taken
MOST_LABELS = 20
LABEL_WORDS = 3


def load_data(
    data: Any,
    *,
    test: Any = None,
    seed: int = 0,
    template: str | None = None,
    tokenizer: Any = None,
    max_tokens: int = MOST_TOKENS,
    labels: Mapping[str, str] | None = None,
) -> Task:
    """A task from the user's file, or from rows in memory.

    data        a file (.txt, .tsv, .csv, .jsonl), a list of dicts, a pandas DataFrame or a datasets.Dataset. Dicts and
                columns have the keys of a .jsonl file: prompt and completion; text and label; messages; or prompt,
                chosen and rejected
    test        the held-out rows, given in the same ways. Training rows that share a prompt with them are left out,
                and told. Without them about a tenth of the rows is held out, by whole prompts (at most 128), picked by
                `seed`
    template    "{prompt} ->" unless told; "{messages}" is the model's chat template, which rows of messages always use
    tokenizer   when given, rows longer than `max_tokens` are named in `skipped` (they are kept, but cut)
    labels      other words for the completions, as in {"1": "positive", "0": "negative"}

    Raises UserError for whatever is wrong with the rows, with file and line.
    """
    content = _relabelled(_content(data), labels)
    remarks = list(content.remarks)
    notes: list[Note] = []
    if test is not None:
        other = _relabelled(_content(test), labels)
        remarks += [r for r in other.remarks if r not in remarks]
        train, held = _without(content, other.rows, notes), other.rows
        held_file = other.file
    else:
        train, held = split(content, seed, remarks)
        held_file = content.file
    return _task(content.file, held_file, train, held, template, tokenizer, max_tokens, notes, remarks)


def load_held_out(
    data: Any,
    *,
    template: str | None = None,
    tokenizer: Any = None,
    max_tokens: int = MOST_TOKENS,
    labels: Mapping[str, str] | None = None,
) -> Task:
    """A task of which all rows are held out and none trained: what an evaluation on a file needs."""
    content = _relabelled(_content(data), labels)
    return _task(
        content.file, content.file, (), content.rows, template, tokenizer, max_tokens, [], list(content.remarks)
    )


def _content(data: Any) -> Content:
    return read_rows(data) if isinstance(data, (str, os.PathLike)) else records(data)


def split(content: Content, seed: int, remarks: list[str]) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """(train, held out) of one file, which share no prompt.

    Prompts are taken whole, in an order shuffled by `seed`, until a tenth of the rows (at most 128 prompts) is held
    out; the held-out rows begin with one row of each prompt, so that the first few of them cover many prompts. When
    all rows have the same prompt, rows with different completions are parted instead, and `remarks` says so.
    """
    rows = content.rows
    key = (lambda r: r.key) if len({r.key for r in rows}) > 1 else (lambda r: r.completion)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    if len(groups) < 2:
        raise UserError(
            f"{content.file} has only one distinct row, so that none can be held out;"
            " give more rows, or a file of held-out rows"
        )
    if len({r.key for r in rows}) == 1:
        remarks.append(f"all rows of {content.file} have the same prompt, so the held-out rows share it with training")
    order = list(groups)
    random.Random(f"lora-lab/held-out/{seed}").shuffle(order)
    wanted = max(1, round(SHARE * len(rows)))
    chosen: list[str] = []
    count = 0
    for name in order:
        size = len(groups[name])
        if count >= wanted or len(chosen) == min(MOST_PROMPTS, len(groups) - 1):
            break
        if count + size <= 1.5 * wanted:  # a prompt with very many rows stays in training
            chosen.append(name)
            count += size
    if not chosen:
        chosen = [min(order, key=lambda name: len(groups[name]))]
    held_names = set(chosen)
    longest = max(len(groups[name]) for name in chosen)
    held = [groups[name][i] for i in range(longest) for name in chosen if i < len(groups[name])]
    return tuple(r for r in rows if key(r) not in held_names), tuple(held)


def _without(content: Content, held: Sequence[Row], notes: list[Note]) -> tuple[Row, ...]:
    """The rows of a training file that share no prompt with the held-out ones."""
    keys = {row.key for row in held}
    train = tuple(row for row in content.rows if row.key not in keys)
    why = "was left out of training (the prompt is also held out)"
    notes += [Note(line=row.line, why=why, file=content.file) for row in content.rows if row.key in keys]
    if not train:
        raise UserError(f"every prompt of {content.file} is also in the held-out file, so nothing is left to train on")
    return train


def _relabelled(content: Content, labels: Mapping[str, str] | None) -> Content:
    if not labels:
        return content
    for row in content.rows:
        if row.completion not in labels:
            error = unknown("word for the label", row.completion, labels)
            raise UserError(f"{content.file}, line {row.line}: {error}")
    return replace(content, rows=tuple(replace(row, completion=labels[row.completion]) for row in content.rows))


def _task(
    file: str,
    held_file: str,
    train: tuple[Row, ...],
    held: tuple[Row, ...],
    template: str | None,
    tokenizer: Any,
    max_tokens: int,
    notes: list[Note],
    remarks: list[str],
) -> Task:
    used = check_template(template) if template is not None else TEMPLATE
    if template is None and all(row.messages for row in train + held):
        used = CHAT
    score_name, scorer, kind = choose_score(train + held)
    if tokenizer is not None:
        notes = notes + list(cut_notes(tokenizer, train, used, max_tokens, file))
        notes += cut_notes(tokenizer, held, used, max_tokens, held_file)
    about = f"{len(train) + len(held):,} rows of {file}: {kind}"
    if held_file != file:
        about = f"{len(train):,} rows of {file}, held out: {len(held):,} of {held_file}; {kind}"
    return Task(
        name=Path(file).stem,
        about=about,
        train=train,
        test=held,
        score_name=score_name,
        scorer=scorer,
        template=used,
        skipped=tuple(notes),
        remarks=tuple(remarks),
        suggested={"max_new_tokens": _new_tokens(train + held, tokenizer)},
        source=file,
    )


def choose_score(rows: Sequence[Row]) -> tuple[str, Scorer, str]:
    """(headline score, scorer, what the rows are).

    Few distinct short completions that come back are labels: accuracy. Sentences (four words or more in the middle
    of the distribution): BLEU. Anything else: exact match. Pairs: whether the text is closer to the better answer.
    Rows without prompts cannot be scored.
    """
    if all(not row.prompt for row in rows):
        return "", score_nothing, "plain text, all of it trained"
    if all(row.rejected for row in rows):
        return "closer", score_pairs, "a prompt, a better answer and a worse one"
    distinct = {row.completion for row in rows}
    short = all(len(text.split()) <= LABEL_WORDS and len(text) <= 40 for text in distinct)
    if short and len(distinct) <= MOST_LABELS and 2 * len(distinct) <= len(rows):
        return "accuracy", score_labels(distinct), f"a text and one of {len(distinct)} labels"
    if statistics.median(len(row.completion.split()) for row in rows) >= 4:
        return "BLEU", score_sentences, "a prompt and a text"
    return "exact match", score_answers, "a prompt and a short answer"


def _new_tokens(rows: Sequence[Row], tokenizer: Any) -> int:
    """Enough new tokens for nearly all completions: their 95th percentile and a bit, from 4 to 256."""
    sample = rows[:: max(1, len(rows) // 500)]
    if tokenizer is not None:
        ids = tokenizer([row.completion for row in sample], add_special_tokens=False, verbose=False)["input_ids"]
        lengths = sorted(len(i) for i in ids)
    else:
        lengths = sorted(-(-len(row.completion) // 3) for row in sample)  # three characters a token, on the safe side
    return min(256, max(4, lengths[int(0.95 * (len(lengths) - 1))] + 3))
