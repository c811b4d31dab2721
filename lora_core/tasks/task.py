"""What a task is: rows to train on, rows held out, a template and a score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_core.errors import UserError

TEMPLATE = "{prompt} ->"  # what stands before a completion, unless the user says otherwise
CHAT = "{messages}"  # the template that means: the model's own chat template
MOST_LABELS = 100


@dataclass(frozen=True, slots=True)
class Row:
    """One example. `line` is its line in the file (the first of them if it spans several), counted from 1.

    prompt    what the model is given; empty for a row of plain text, of which everything is trained
    completion  what it should say; the loss is on this alone
    messages  (role, content) pairs when the row is a conversation; the last one is the assistant's and equals
              `completion`; `prompt` then holds the conversation before it in a form that people can read
    rejected  a worse answer to the same prompt, where the row is a pair to prefer one of; else empty
    """

    prompt: str
    completion: str
    line: int = 0
    messages: tuple[tuple[str, str], ...] = ()
    rejected: str = ""

    @property
    def key(self) -> str:
        """What two rows must not share when one is trained on and the other held out: the prompt, or all the text."""
        return self.prompt or self.completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something that happened to one row: it was kept, but cut, or left out of training. `why` goes on to say it."""

    line: int
    why: str
    kind: Literal["cut", "left out"] = "left out"
    file: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {"line": self.line, "why": self.why, "kind": self.kind, "file": self.file}


# (predictions, their rows, all held-out rows of the task) -> {name of the score: value}
Scorer = Callable[[Sequence[str], Sequence[Row], Sequence[Row]], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows to train on and rows held out, which share no prompt, with the template and the score that belong to them.

    score_name  the headline score; empty when nothing can be scored (rows of plain text have no prompt)
    template    what is put before the completion; `{prompt}` stands for the prompt
    skipped     rows that were cut or left out, with their lines
    remarks     whatever else the user should know about the file, one sentence each
    suggested   settings that fit the task: max_new_tokens
    source      the name of the user's file, without its folder; empty for a task of our own
    """

    name: str
    about: str
    train: tuple[Row, ...]
    test: tuple[Row, ...]
    score_name: str
    scorer: Scorer = field(repr=False, compare=False)
    template: str = TEMPLATE
    skipped: tuple[Note, ...] = ()
    remarks: tuple[str, ...] = ()
    suggested: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def score(self, predictions: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
        """Score generated completions of `rows` (as many as predictions). The first key is the headline.

        BLEU and chrF are on 0..100, all others are shares from 0 to 1. Prompts that occur in several rows count once
        in BLEU, with the completions of all held-out rows of that prompt as references. Returns {} without a score.
        """
        if len(predictions) != len(rows):
            raise ValueError(f"{len(predictions)} predictions for {len(rows)} rows")
        return self.scorer(predictions, rows, self.test) if rows else {}

    def score_rows(self, limit: int | None = None) -> tuple[Row, ...]:
        """Held-out rows to generate for: the first of each prompt, at most `limit`; empty when nothing is scored."""
        if not self.score_name:
            return ()
        first: dict[str, Row] = {}
        for row in self.test:
            first.setdefault(row.key, row)
        return tuple(first.values())[:limit]

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks and skipped rows in sentences that can be shown."""
        return self.remarks + summarise(self.skipped)

    def to_dict(self) -> dict[str, Any]:
        """All but the rows, as plain JSON values."""
        return {
            "name": self.name,
            "about": self.about,
            "train_rows": len(self.train),
            "test_rows": len(self.test),
            "score_name": self.score_name,
            "template": self.template,
            "skipped": [note.to_dict() for note in self.skipped],
            "notes": list(self.notes),
            "suggested": dict(self.suggested),
            "source": self.source,
        }


def labels_of(task: Task) -> tuple[str, ...]:
    """The labels that a classifier is to tell apart: the task's distinct completions, sorted; from 2 to 100 of them.

    Raises UserError for fewer or more, and for a row that has no prompt to be classified.
    """
    rows = task.train + task.test
    if any(not row.prompt for row in rows):
        raise UserError(f"{task.name!r} has rows of plain text; a classifier needs a text and a label in each")
    labels = sorted({row.completion for row in rows})
    if not 2 <= len(labels) <= MOST_LABELS:
        some = ", ".join(f"'{t[:40]}'" for t in labels[:3])
        raise UserError(
            f"{task.name!r} has {len(labels):,} different completions ({some}{', …' if len(labels) > 3 else ''}); "
            f"a classifier tells 2 to {MOST_LABELS} labels apart"
        )
    return tuple(labels)


def summarise(notes: Sequence[Note], most: int = 8) -> tuple[str, ...]:
    """One sentence for each reason, which names at most `most` lines.

    ``2 rows of long.txt are longer than 256 tokens and were cut: lines 5, 9``
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for note in notes:
        groups.setdefault((note.file, note.why), []).append(note.line)
    sentences = []
    for (file, why), lines in groups.items():
        where = f" of {file}" if file else ""
        named = ", ".join(str(n) for n in lines[:most])
        more = f" and {len(lines) - most:,} more" if len(lines) > most else ""
        if len(lines) == 1:
            sentences.append(f"1 row{where} {why}: line {named}")
        else:
            # `why` is written for one row; these are its two plural forms.
            plural = why.replace("is longer", "are longer").replace("was ", "were ").replace("has ", "have ")
            sentences.append(f"{len(lines):,} rows{where} {plural}: lines {named}{more}")
    return tuple(sentences)
