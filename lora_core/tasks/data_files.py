"""The user's own file -> rows. Strict and bounded: every error names the file and, where there is one, the line.

.txt          one row a line, ``prompt||completion``, split at the first ``||``
.tsv          a header (``prompt completion``, ``text label``, ``sentence label`` or ``text``), or no header and
              ``text<TAB>label`` on every line. Labels stay as they are written ("1" is trained as "1").
.csv          the same headers, required; cells in quotes may hold commas and line ends
.jsonl        one object a line: ``prompt`` and ``completion``; or ``prompt``, ``chosen`` and ``rejected``, two answers
              of which the first is better; or ``text``; or ``messages`` [{role, content}, …], of which the last is
              the assistant's

UTF-8, with or without a BOM; lines end in LF or CRLF; empty lines are passed over.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from lora_core.errors import UserError, nearest, unknown
from lora_core.tasks.task import Row

MOST_BYTES = 64 * 1024 * 1024
MOST_ROWS = 200_000
MOST_CHARACTERS = 100_000  # of one line or cell; below the csv module's own limit of 131,072
EXTENSIONS = (".txt", ".tsv", ".csv", ".jsonl")
SEPARATOR = "||"
# header -> (column of the prompt, column of the completion); None: there is no prompt, all of it is trained
HEADERS: dict[tuple[str, ...], tuple[str | None, str]] = {
    ("prompt", "completion"): ("prompt", "completion"),
    ("text", "label"): ("text", "label"),
    ("sentence", "label"): ("sentence", "label"),  # GLUE's own files
    ("text",): (None, "text"),
}
COLUMNS = ("prompt", "completion", "text", "label", "sentence")
# First cells of a .tsv without a known header that are surely the header of some other format.
OTHER_COLUMNS = set(
    "answer category class comment content context id idx index input instruction output question rating reference "
    "response review score sentiment source summary target title".split()
)
HEADER_HELP = "the header can be prompt,completion or text,label"


@dataclass(frozen=True, slots=True)
class Content:
    """What a file holds: its rows, and sentences about what was passed over."""

    file: str
    rows: tuple[Row, ...]
    remarks: tuple[str, ...] = ()


def read_rows(path: str | os.PathLike[str]) -> Content:
    """All rows of the file, in its order. Raises UserError for anything that is not as the module says."""
    file = Path(path)
    text = _text(file)
    remarks: list[str] = []
    suffix = file.suffix.lower()
    if suffix == ".txt":
        found = _txt(file.name, text)
    elif suffix == ".jsonl":
        found = _jsonl(file.name, text)
    else:
        found = _table(file.name, text, suffix, remarks)
    rows: list[Row] = []
    for row in found:
        rows.append(row)
        if len(rows) > MOST_ROWS:
            raise UserError(f"{file.name} has more than {MOST_ROWS:,} rows; give a smaller file")
    if not rows:
        raise UserError(f"{file.name} has no rows")
    return Content(file.name, tuple(rows), tuple(remarks))


def _text(file: Path) -> str:
    """The whole file as text, without its BOM."""
    try:
        if file.is_dir():
            raise UserError(f"'{file.name or file}' is a folder; give a file ({' '.join(EXTENSIONS)})")
        if not file.exists():
            hint = _beside(file)
            raise UserError(f"no file '{file}'" + (f" (did you mean '{hint}'?)" if hint else ""))
        if not file.is_file():  # opening a pipe or a device could wait for ever
            raise UserError(f"'{file.name}' is not a regular file")
        if file.suffix.lower() not in EXTENSIONS:
            raise unknown("reader for files that end in", file.suffix or file.name, EXTENSIONS)
        with file.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"{file.name[:80]} cannot be read: {error.strerror}") from error
    if len(data) > MOST_BYTES:
        raise UserError(f"{file.name} is larger than {MOST_BYTES // 2**20} MB; give a smaller file")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{file.name} is UTF-16; save it as UTF-8")
    if b"\0" in data:
        raise UserError(f"{file.name} is not text: line {_line(data, data.index(0))} has a NUL byte")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = data[error.start : error.start + 1].hex()
        raise UserError(
            f"{file.name}, line {_line(data, error.start)}: not UTF-8 text (byte 0x{bad}); save the file as UTF-8"
        ) from None
    if not text.strip():
        raise UserError(f"{file.name} is empty")
    return text


def _beside(missing: Path) -> str | None:
    """The file in the same folder that was probably meant."""
    if not missing.parent.is_dir():
        return None
    with os.scandir(missing.parent) as entries:
        return nearest(missing.name, [entry.name for entry in islice(entries, 1000)])


def _line(data: bytes, at: int) -> int:
    return data.count(b"\n", 0, at) + 1


def _bad(file: str, line: int, what: str) -> UserError:
    return UserError(f"{file}, line {line}: {what}")


def _lines(file: str, text: str) -> Iterator[tuple[int, str]]:
    """(number, line) of all that are not empty. Only LF and CRLF end a line: text may hold U+2028 or a form feed."""
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > MOST_CHARACTERS:
            raise _bad(file, number, f"longer than {MOST_CHARACTERS:,} characters")
        if line.strip():
            yield number, line.removesuffix("\r")


def _row(file: str, line: int, prompt: str, completion: str, names: tuple[str, str] = ("prompt", "completion")) -> Row:
    """A row with both halves stripped, or the error that says which one is missing."""
    prompt, completion = prompt.strip(), completion.strip()
    if not completion:
        raise _bad(file, line, f"no {names[1]}")
    if not prompt:
        raise _bad(file, line, f"no {names[0]}")
    return Row(prompt, completion, line)


def _txt(file: str, text: str) -> Iterator[Row]:
    for number, line in _lines(file, text):
        prompt, separator, completion = line.partition(SEPARATOR)
        if not separator:
            raise _bad(
                file, number, f"no completion: there is no {SEPARATOR}; a line reads prompt{SEPARATOR}completion"
            )
        yield _row(file, number, prompt, completion)


def _table(file: str, text: str, suffix: str, remarks: list[str]) -> Iterator[Row]:
    """Rows of a .csv or .tsv."""
    tabs = suffix == ".tsv"
    records = _tsv_records(file, text) if tabs else _records(file, text, ",", csv.QUOTE_MINIMAL)
    first_line, first = next(records, (0, []))
    if not first:  # nothing but separators
        raise UserError(f"{file} has no rows")
    header = [cell.strip().lower() for cell in first]
    known = next((h for h in HEADERS if set(h) <= set(header)), None)
    if known is None:
        if not tabs:
            raise _wrong_header(file, first_line, first)
        looks_like_header = all(cell.isidentifier() for cell in header) and (
            any(cell in COLUMNS or cell in OTHER_COLUMNS for cell in header)
        )
        if looks_like_header:
            raise _wrong_header(file, first_line, first)
        yield _label_row(file, first_line, first)
        for number, cells in records:
            yield _label_row(file, number, cells)
        return
    twice = [name for name in known if header.count(name) > 1]
    if twice:
        raise _bad(file, first_line, f"the header has '{twice[0]}' more than once")
    unused = [cell.strip() for cell in first if cell.strip().lower() not in known]
    if unused:
        remarks.append(f"{file}: columns not used: {', '.join(unused[:8])}{' …' if len(unused) > 8 else ''}")
    left, right = HEADERS[known]
    for number, cells in records:
        if len(cells) != len(header):
            missing = f"no {right}: " if len(cells) <= header.index(right) else ""
            raise _bad(file, number, f"{missing}{_columns(len(cells))} where the header has {len(header)}")
        completion = cells[header.index(right)]
        if left is None:
            if not completion.strip():
                raise _bad(file, number, f"no {right}")
            yield Row("", completion.strip(), number)
        else:
            yield _row(file, number, cells[header.index(left)], completion, (left, right))


def _label_row(file: str, number: int, cells: list[str]) -> Row:
    if len(cells) != 2:
        what = "no label: " if len(cells) == 1 else ""
        raise _bad(
            file, number, f"{what}{_columns(len(cells))}; a .tsv without a header has text<TAB>label on each line"
        )
    return _row(file, number, cells[0], cells[1], ("text", "label"))


def _columns(n: int) -> str:
    return "1 column" if n == 1 else f"{n} columns"


def _wrong_header(file: str, line: int, cells: list[str]) -> UserError:
    given = ",".join(cell.strip() for cell in cells)
    if len(cells) == 1 and any(mark in given for mark in ";\t"):
        return _bad(file, line, f"the columns of a .csv are separated by commas; {HEADER_HELP}")
    close = nearest(given.lower(), [",".join(h) for h in HEADERS])
    shown = given if len(given) <= 80 else given[:77] + "…"
    return _bad(
        file, line, f"unknown header '{shown}'; {HEADER_HELP}" + (f" (did you mean '{close}'?)" if close else "")
    )


def _tsv_records(file: str, text: str) -> Iterator[tuple[int, list[str]]]:
    """Spreadsheets put quotes around cells, corpora do not and hold stray quotes: what fits the whole file counts.

    A cell with a line end and a tab in it is most likely several rows between two stray quotes.
    """
    if '"' in text:
        try:
            records = list(_records(file, text, "\t", csv.QUOTE_MINIMAL))
            stray = any("\n" in cell and "\t" in cell for _, cells in records for cell in cells)
            if not stray and len({len(cells) for _, cells in records}) == 1:
                return iter(records)
        except UserError:
            pass
    return _records(file, text, "\t", csv.QUOTE_NONE)


def _records(file: str, text: str, delimiter: str, quoting: Any) -> Iterator[tuple[int, list[str]]]:
    """(first line, cells) of each record that is not empty."""
    # With newline="" the csv module sees line ends as they are. A lone CR would end a record there: only CRLF may.
    reader = csv.reader(
        io.StringIO(text.replace("\r\n", "\n"), newline="\n"), delimiter=delimiter, quoting=quoting, strict=True
    )
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _bad(file, start, f"cannot be read as a row: {error}") from None
        if any(len(cell) > MOST_CHARACTERS for cell in cells):
            raise _bad(file, start, f"longer than {MOST_CHARACTERS:,} characters")
        if any(cell.strip() for cell in cells):
            yield start, cells


def _jsonl(file: str, text: str) -> Iterator[Row]:
    for number, line in _lines(file, text):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            where = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            what = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply or a number too long"
            hint = "; a .jsonl file has one object on each line" if number == 1 and line.lstrip()[:1] in "[{" else ""
            raise _bad(file, number, f"not JSON: {what}{where}{hint}") from None
        yield json_row(file, number, value)


def json_row(file: str, line: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise _bad(file, line, f"a JSON object is needed, this is {_kind(value)}")
    if "messages" in value:
        return _messages_row(file, line, value["messages"])
    if "chosen" in value or "rejected" in value:
        prompt, chosen, rejected = (_part(file, line, value, name) for name in ("prompt", "chosen", "rejected"))
        row = _row(file, line, prompt, chosen, ("prompt", "chosen"))
        if not rejected.strip():
            raise _bad(file, line, "no rejected")
        if row.completion == rejected.strip():
            raise _bad(file, line, "chosen and rejected are the same, so that there is nothing to prefer")
        return replace(row, rejected=rejected.strip())
    if "prompt" in value or "completion" in value:
        return _row(file, line, _part(file, line, value, "prompt"), _part(file, line, value, "completion"))
    if "text" in value:
        label = value.get("label")
        if not isinstance(value["text"], str):
            raise _bad(file, line, f"text must be text, this is {_kind(value['text'])}")
        if isinstance(label, (str, int)) and not isinstance(label, bool):
            return _row(
                file, line, _clean(file, line, value["text"]), _clean(file, line, str(label)), ("text", "label")
            )
        if not value["text"].strip():
            raise _bad(file, line, "the text is empty")
        return Row("", _clean(file, line, value["text"]).strip(), line)
    given = ", ".join(list(value)[:6]) or "none"
    keys = ("prompt", "completion", "chosen", "rejected", "text", "messages")
    close = next((c for c in (nearest(key, keys) for key in value) if c), None)
    hint = f" (did you mean '{close}'?)" if close else ""
    needed = "needs the keys prompt and completion, or prompt, chosen and rejected, or text, or messages"
    raise _bad(file, line, f"{needed}; it has {given}{hint}")


def _part(file: str, line: int, value: dict[str, Any], name: str) -> str:
    """One text of a JSON row."""
    if name not in value:
        raise _bad(file, line, f"no {name}")
    if not isinstance(value[name], str):
        raise _bad(file, line, f"{name} must be text, this is {_kind(value[name])}")
    return _clean(file, line, value[name])


def _messages_row(file: str, line: int, messages: Any) -> Row:
    if not isinstance(messages, list) or not messages:
        raise _bad(file, line, "messages must be a list of {role, content}")
    turns: list[tuple[str, str]] = []
    for i, message in enumerate(messages, 1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise _bad(file, line, f"message {i} must have a role and a content, both text")
        if role not in ("system", "user", "assistant"):
            raise _bad(file, line, str(unknown("role", role, ("system", "user", "assistant"), f"in message {i}")))
        turns.append((role, _clean(file, line, content)))
    if turns[-1][0] != "assistant" or not turns[-1][1].strip():
        raise _bad(file, line, "no completion: the last message must be the assistant's, and not empty")
    if not any(role == "user" and content.strip() for role, content in turns):
        raise _bad(file, line, "no prompt: there is no message of the user")
    before = turns[:-1]
    shown = before[0][1] if len(before) == 1 else "\n".join(f"{role}: {content}" for role, content in before)
    return Row(shown.strip(), turns[-1][1].strip(), line, tuple(turns))


def _clean(file: str, line: int, text: str) -> str:
    """JSON can spell what UTF-8 cannot hold (a lone surrogate) and what no text has (NUL): refuse both."""
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise _bad(file, line, "not text: it holds a NUL or half a surrogate pair")
    return text


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
