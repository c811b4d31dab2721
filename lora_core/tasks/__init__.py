"""What a model is trained on: six tasks of our own, and the user's files.

    task = load_task("restaurant", seed=0)          # or load_data("my.tsv"), see lora_core.tasks.data_files
    task.train, task.test                            # rows: prompt, completion, …; the two share no prompt
    encode_many(tokenizer, task.train, task.template, max_tokens)   # -> Encoded(ids, start, cut)
    prompt_text(tokenizer, row, task.template)       # what generate() is given
    task.score(predictions, task.score_rows(64))     # {"BLEU": 31.2, "slot accuracy": 0.8}

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable

from lora_core.errors import UserError, unknown
from lora_core.tasks import json_records, new_language, pirate, plain, restaurant, sentiment
from lora_core.tasks.data_files import read_rows
from lora_core.tasks.encode import (
    Encoded,
    check_template,
    cut_notes,
    encode,
    encode_many,
    pieces,
    preview,
    prompt_text,
)
from lora_core.tasks.task import CHAT, TEMPLATE, Note, Row, Task, labels_of, summarise
from lora_core.tasks.uploads import load_data, load_held_out

__all__ = [
    "CHAT",
    "TEMPLATE",
    "Encoded",
    "Note",
    "Row",
    "Task",
    "check_template",
    "cut_notes",
    "encode",
    "encode_many",
    "labels_of",
    "load_data",
    "load_held_out",
    "load_task",
    "pieces",
    "preview",
    "prompt_text",
    "read_rows",
    "summarise",
    "task_names",
]

TRAIN_ROWS, TEST_ROWS = 1000, 128
MOST_ROWS = 20_000
_BUILDERS: dict[str, tuple[str, Callable[[int, int, int], Task]]] = {
    module.NAME: (module.ABOUT, module.build)
    for module in (restaurant, json_records, sentiment, pirate, new_language, plain)
}


def task_names() -> list[tuple[str, str]]:
    """(name, what it is in one sentence) of every task of our own."""
    return [(name, about) for name, (about, _) in _BUILDERS.items()]


def load_task(name: str, *, seed: int = 0, train: int = TRAIN_ROWS, test: int = TEST_ROWS) -> Task:
    """A task of our own: `train` rows to train on and `test` held out, the same for the same seed everywhere.

    Raises UserError for an unknown name, a negative seed, or more rows than the grammar can tell apart.
    """
    if name not in _BUILDERS:
        raise unknown("task", str(name), _BUILDERS)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(f"seed is {seed!r}; it is a whole number from 0")
    for what, rows in (("train", train), ("test", test)):
        if isinstance(rows, bool) or not isinstance(rows, int) or not 1 <= rows <= MOST_ROWS:
            raise UserError(f"{what} is {rows!r} rows; it can be 1 to {MOST_ROWS:,}")
    return _BUILDERS[name][1](seed, train, test)
