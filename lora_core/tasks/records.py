"""Rows that are already in memory -> rows of a task: lists of dicts, pandas frames, `datasets.Dataset`.

They have the keys of a .jsonl file (see data_files.py), or `sentence` and `label` as GLUE has them, and are checked as
strictly; an error names the row, counted from 1. Neither pandas nor datasets is imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lora_core.errors import UserError
from lora_core.tasks.data_files import MOST_ROWS, Content, json_row
from lora_core.tasks.task import Row

USED = ("prompt", "completion", "text", "sentence", "label", "messages", "chosen", "rejected")


def records(data: Any) -> Content:
    """All rows of a list of dicts, of a DataFrame (its columns are the keys) or of a Dataset (labels by their names).

    Raises UserError for what is none of these, and for the first row that cannot be used.
    """
    kind = type(data).__name__
    names: dict[str, list[str]] = {}
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # pandas
        rows: Iterable[Any] = data.to_dict("records")
        columns = [str(c) for c in data.columns]
    elif hasattr(data, "column_names") and isinstance(data, Mapping):
        raise UserError(f"this {kind} holds several sets ({', '.join(map(str, data))}); give one of them")
    elif hasattr(data, "column_names") and hasattr(data, "features"):  # datasets
        rows, columns = data, list(data.column_names)
        names = {c: f.names for c, f in data.features.items() if getattr(f, "names", None)}
    elif isinstance(data, (list, tuple)):
        rows = data
        columns = list(dict.fromkeys(str(k) for d in data if isinstance(d, Mapping) for k in d))
    else:
        raise UserError(f"data is {kind}; it can be a file, a list of dicts, a pandas DataFrame or a datasets.Dataset")
    out: list[Row] = []
    for number, given in enumerate(rows, 1):
        if number > MOST_ROWS:
            raise UserError(f"the {kind} has more than {MOST_ROWS:,} rows; give fewer")
        try:
            out.append(json_row(kind, number, _plain(given, names)))
        except UserError as error:
            raise UserError(str(error).replace(f"{kind}, line {number}:", f"{kind}, row {number}:", 1)) from None
    if not out:
        raise UserError(f"the {kind} has no rows")
    unused = [c for c in columns if c not in USED]
    more = f"{', '.join(unused[:8])}{' …' if len(unused) > 8 else ''}"
    return Content(kind, tuple(out), (f"{kind}: columns not used: {more}",) if unused else ())


def _plain(given: Any, names: Mapping[str, list[str]]) -> Any:
    """A row as JSON would have it: labels by name where they have names, whole numbers as such, no numpy."""
    if not isinstance(given, Mapping):
        return given
    row = {str(k): v.tolist() if hasattr(v, "tolist") else v for k, v in given.items()}
    for column, words in names.items():
        value = row.get(column)
        if isinstance(value, int) and 0 <= value < len(words):
            row[column] = words[value]
    if "text" not in row and "sentence" in row and "prompt" not in row:
        row["text"] = row.pop("sentence")
    if "label" in row and "text" in row:
        label = row["label"]
        if isinstance(label, float) and label.is_integer():
            row["label"] = int(label)  # a column with a gap in it is one of floats
        elif label is None or isinstance(label, float) or label == -1:  # NaN; -1 is what datasets has for unknown
            row["label"] = ""
        elif isinstance(label, bool):
            row["label"] = str(label)
    return row
