"""The user's files: every format read, everything wrong named with its line."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_core.errors import UserError
from lora_core.tasks import data_files, read_rows

SETTINGS = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Any text a file can hold, on one line, without spaces at its ends (they are not kept).
CELL = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\r\n\t"), min_size=1, max_size=40).map(
    str.strip
).filter(bool)  # fmt: skip
PAIRS = st.lists(st.tuples(CELL, CELL), min_size=1, max_size=8)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def pairs(path: Path) -> list[tuple[str, str]]:
    return [(r.prompt, r.completion) for r in read_rows(path).rows]


def lines(path: Path) -> list[int]:
    return [r.line for r in read_rows(path).rows]


# reading back what was written


@SETTINGS
@given(rows=PAIRS, ending=st.sampled_from(["\n", "\r\n"]), bom=st.booleans())
def test_txt_round_trip(tmp_path: Path, rows: list[tuple[str, str]], ending: str, bom: bool) -> None:
    rows = [(p.replace("|", "/").removeprefix("\ufeff"), c) for p, c in rows]
    rows = [(p, c) for p, c in rows if p]
    text = "".join(f"{p}||{c}{ending}" for p, c in rows)
    path = write(tmp_path, "a.txt", ("\ufeff" if bom else "").encode() + text.encode())
    if rows:
        assert pairs(path) == rows
        assert lines(path) == list(range(1, len(rows) + 1))


@SETTINGS
@given(rows=PAIRS, ending=st.sampled_from(["\n", "\r\n"]), bom=st.booleans(), breaks=st.booleans())
def test_csv_round_trip_with_line_ends_in_cells(
    tmp_path: Path, rows: list[tuple[str, str]], ending: str, bom: bool, breaks: bool
) -> None:
    if breaks:
        rows = [(f'{p}\nmore, of "it"', f"{c}\n\nlast") for p, c in rows]
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=ending)
    writer.writerow(["prompt", "completion"])
    writer.writerows(rows)
    path = write(tmp_path, "a.csv", ("\ufeff" if bom else "").encode() + out.getvalue().encode())
    assert pairs(path) == rows
    height = 4 if breaks else 1
    assert lines(path) == [2 + i * height for i in range(len(rows))]


@SETTINGS
@given(rows=PAIRS, header=st.booleans())
def test_tsv_round_trip_as_a_spreadsheet_writes_it(tmp_path: Path, rows: list[tuple[str, str]], header: bool) -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter="\t", lineterminator="\n")
    rows = [(f"text {p}", c) for p, c in rows]
    writer.writerows([("text", "label"), *rows] if header else rows)
    path = write(tmp_path, "a.tsv", out.getvalue())
    assert pairs(path) == rows
    assert lines(path) == list(range(1 + header, len(rows) + 1 + header))


@SETTINGS
@given(rows=st.lists(st.tuples(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=40)), min_size=1),
       escaped=st.booleans())  # fmt: skip
def test_jsonl_round_trip(tmp_path: Path, rows: list[tuple[str, str]], escaped: bool) -> None:
    kept = [(p.strip(), c.strip()) for p, c in rows if "\0" not in p + c and p.strip() and c.strip()]
    if not kept:
        return
    text = "\n".join(json.dumps({"prompt": p, "completion": c}, ensure_ascii=escaped) for p, c in kept)
    assert pairs(write(tmp_path, "a.jsonl", text)) == kept


def test_empty_lines_count_but_are_no_rows(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "\n\na||b\r\n \r\n c d || e || f \n\n")
    assert pairs(path) == [("a", "b"), ("c d", "e || f")]
    assert lines(path) == [3, 5]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt", "a.jsonl"])
@pytest.mark.parametrize("text", [",", ",\n,,\n", "\t", "\t\t\n\t", "\n", '""', "||"])
def test_nothing_but_separators_is_told(name: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        read_rows(write(tmp_path, name, text))


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "one\u2028two\x0c\x85three||four\u2029five\nx||y")
    assert lines(path) == [1, 2]
    assert read_rows(path).rows[0].completion == "four\u2029five"


def test_headers(tmp_path: Path) -> None:
    assert pairs(write(tmp_path, "a.csv", "Completion, Prompt\nb,a\n")) == [("a", "b")]
    assert pairs(write(tmp_path, "b.tsv", "sentence\tlabel\nfine\t1\n")) == [("fine", "1")]
    assert pairs(write(tmp_path, "c.csv", 'text\n"only, text"\n')) == [("", "only, text")]
    extra = read_rows(write(tmp_path, "d.csv", "id,text,label,date\n7,good,yes,now\n"))
    assert [(r.prompt, r.completion) for r in extra.rows] == [("good", "yes")]
    assert extra.remarks == ("d.csv: columns not used: id, date",)


def test_tsv_of_a_corpus_with_stray_quotes(tmp_path: Path) -> None:
    text = '"a fine film , he said\t1\n"great" acting\t1\nit ends with "\t0\n'
    assert pairs(write(tmp_path, "a.tsv", text)) == [
        ('"a fine film , he said', "1"),
        ('"great" acting', "1"),
        ('it ends with "', "0"),
    ]
    # Between these two stray quotes lie two rows, not one cell.
    assert len(pairs(write(tmp_path, "b.tsv", '"dull\t0\nplain\t0\nfine"\t1\n'))) == 3


def test_jsonl_kinds(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    longer = [{"role": "system", "content": "Be kind."}, *chat, {"role": "user", "content": "Bye"},
              {"role": "assistant", "content": " Goodbye "}]  # fmt: skip
    values = [{"text": "all of it"}, {"text": "good", "label": 1}, {"messages": chat}, {"messages": longer}]
    rows = read_rows(write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, values)))).rows
    assert [(r.prompt, r.completion, len(r.messages)) for r in rows] == [
        ("", "all of it", 0),
        ("good", "1", 0),
        ("Hi", "Hello", 2),
        ("system: Be kind.\nuser: Hi\nassistant: Hello\nuser: Bye", "Goodbye", 5),
    ]


# what is wrong is named

BAD_ROWS = [
    ("a.txt", "a||b\nc||\n", "a.txt, line 2: no completion"),
    ("a.txt", "a||b\n\nno separator\n", "a.txt, line 3: no completion: there is no ||"),
    ("a.txt", "||b\n", "a.txt, line 1: no prompt"),
    ("a.tsv", "fine\t1\nnothing\n", "a.tsv, line 2: no label: 1 column"),
    ("a.tsv", "fine\t1\nnothing\t \n", "a.tsv, line 2: no label"),
    ("a.tsv", "fine\t1\n\t0\n", "a.tsv, line 2: no text"),
    ("a.tsv", "fine\t1\na\tb\tc\n", "a.tsv, line 2: 3 columns"),
    ("a.tsv", "question\tanswer\nwhy\tso\n", "a.tsv, line 1: unknown header 'question,answer'; the header can be"),
    ("a.tsv", "prompt\tanswer\nwhy\tso\n", "a.tsv, line 1: unknown header"),
    ("a.csv", "prompt,completion\na,b\nc,\n", "a.csv, line 3: no completion"),
    ("a.csv", 'prompt,completion\n"a\nb",c\nd\n', "a.csv, line 4: no completion: 1 column where the header has 2"),
    ("a.csv", "prompt,completion\na,b,c\n", "a.csv, line 2: 3 columns where the header has 2"),
    ("a.csv", 'prompt,completion\na,b\n"never closed,c\nd,e\n', "a.csv, line 3: cannot be read as a row"),
    ("a.csv", "promt,completion\na,b\n", "unknown header 'promt,completion'; the header can be prompt,completion or "
     "text,label (did you mean 'prompt,completion'?)"),
    ("a.csv", "prompt;completion\na;b\n", "a.csv, line 1: the columns of a .csv are separated by commas"),
    ("a.csv", "text,label,text\na,b,c\n", "a.csv, line 1: the header has 'text' more than once"),
    ("a.csv", "text,label\n", "a.csv has no rows"),
    ("a.csv", "text\n\n\n\"  \"\n", "a.csv has no rows"),
    ("a.jsonl", '{"text": "a"}\n{"text": }\n', "a.jsonl, line 2: not JSON: Expecting value at column 10"),
    ("a.jsonl", '[\n{"text": "a"}\n]\n', "a.jsonl, line 1: not JSON"),
    ("a.jsonl", "[" * 50_000, "a.jsonl, line 1: not JSON"),
    ("a.jsonl", '{"text": "a"}\n[1]\n', "a.jsonl, line 2: a JSON object is needed, this is a list"),
    ("a.jsonl", '{"prompt": "a"}\n', "a.jsonl, line 1: no completion"),
    ("a.jsonl", '{"prompt": "a", "completion": null}\n', "a.jsonl, line 1: completion must be text, this is null"),
    ("a.jsonl", '{"prompt": "a", "completion": " "}\n', "a.jsonl, line 1: no completion"),
    ("a.jsonl", '{"text": " "}\n', "a.jsonl, line 1: the text is empty"),
    ("a.jsonl", '{"promt": "a", "answer": "b"}\n', "it has promt, answer (did you mean 'prompt'?)"),
    ("a.jsonl", '{"text": "half \\ud800"}\n', "a.jsonl, line 1: not text"),
    ("a.jsonl", '{"text": "nul \\u0000"}\n', "a.jsonl, line 1: not text"),
    ("a.jsonl", '{"messages": "hi"}\n', "a.jsonl, line 1: messages must be a list"),
    ("a.jsonl", '{"messages": [{"role": "user"}]}\n', "a.jsonl, line 1: message 1 must have a role and a content"),
    ("a.jsonl", '{"messages": [{"role": "usr", "content": "x"}]}\n', "did you mean 'user'?"),
    ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n', "a.jsonl, line 1: no completion"),
    ("a.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}\n', "a.jsonl, line 1: no prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BAD_ROWS)
def test_bad_rows(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_rows(write(tmp_path, name, content))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.jsonl", b"\xef\xbb\xbf \r\n\n", "a.jsonl is empty"),
        ("a.txt", b"a||b\nc\0d||e\n", "a.txt is not text: line 2 has a NUL byte"),
        ("a.csv", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a.csv is not text"),
        ("a.txt", "a||b\ncafé||ç\n".encode("latin-1"), "a.txt, line 2: not UTF-8 text (byte 0xe9)"),
        ("a.txt", "a||b\n".encode("utf-16"), "a.txt is UTF-16; save it as UTF-8"),
        ("a.parquet", b"PAR1", "no reader for files that end in '.parquet'; possible: .txt .tsv .csv .jsonl"),
        ("a.json", b"{}", "(did you mean '.jsonl'?)"),
        ("noending", b"a||b", "no reader for files that end in 'noending'"),
    ],
)
def test_files_that_are_not_what_they_should_be(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_rows(write(tmp_path, name, content))
    assert message in str(error.value)


def test_no_such_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "reviews_train.tsv", "a\tb")
    with pytest.raises(UserError, match=r"no file '.*reviews_trian.tsv' \(did you mean 'reviews_train.tsv'\?\)"):
        read_rows(tmp_path / "reviews_trian.tsv")
    with pytest.raises(UserError, match="no file"):
        read_rows(tmp_path / "nowhere" / "a.txt")
    with pytest.raises(UserError, match="cannot be read"):
        read_rows(tmp_path / ("x" * 5000 + ".txt"))


def test_a_folder_or_a_pipe_is_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "data.txt"
    folder.mkdir()
    with pytest.raises(UserError, match=r"'data.txt' is a folder; give a file"):
        read_rows(folder)
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="not a regular file"):
        read_rows(pipe)


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.jsonl"])
def test_size_is_bounded(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "a.txt": lambda x: f"p||{x}",
        "a.csv": lambda x: f"p,{x}",
        "a.tsv": lambda x: f"p\t{x}",
        "a.jsonl": lambda x: json.dumps({"prompt": "p", "completion": x}),
    }[name]
    head = "text,label\n" if name == "a.csv" else ""
    long_line = 2 + (name == "a.csv")
    path = write(tmp_path, name, f"{head}{rows('y')}\n{rows('x' * (data_files.MOST_CHARACTERS + 1))}\n")
    with pytest.raises(UserError, match=rf"{name}, line {long_line}: longer than 100,000 characters"):
        read_rows(path)
    monkeypatch.setattr(data_files, "MOST_ROWS", 3)
    path = write(tmp_path, name, head + "\n".join(rows(str(i)) for i in range(4)))
    with pytest.raises(UserError, match=f"{name} has more than 3 rows"):
        read_rows(path)
    monkeypatch.setattr(data_files, "MOST_BYTES", 5)
    with pytest.raises(UserError, match=f"{name} is larger than"):
        read_rows(path)


@SETTINGS
@given(content=st.binary(max_size=200), name=st.sampled_from(["a.txt", "a.csv", "a.tsv", "a.jsonl"]))
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path: Path, content: bytes, name: str) -> None:
    path = write(tmp_path, name, content)
    try:
        rows = read_rows(path).rows
    except UserError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 500
    else:
        assert rows and all(row.completion and row.line >= 1 for row in rows)


@SETTINGS
@given(
    content=st.text(alphabet='ab|,\t"\n\r{}:[]1 ', max_size=60),
    name=st.sampled_from(["a.txt", "a.csv", "a.tsv", "a.jsonl"]),
)
def test_any_odd_text_is_read_or_refused_in_one_line(tmp_path: Path, content: str, name: str) -> None:
    head = "text,label\n" if name == "a.csv" else ""
    path = write(tmp_path, name, head + content)
    try:
        rows = read_rows(path).rows
    except UserError as error:
        assert str(error) and "\n" not in str(error)
    else:
        total = (head + content).count("\n") + 1
        assert all(1 <= row.line <= total for row in rows)
        assert [r.line for r in rows] == sorted({r.line for r in rows})
