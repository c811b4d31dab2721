"""Fuzzed data files, and what all fuzzed files need: a folder for the cases, and what stands in a file's place.

Each target has a strategy that makes a case and a check that puts it on the disk and reads it as the page does. What
comes out is a sentence for a person, or a result that is checked.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.fuzz_values import ANY, changed
from tests.fuzz_watch import told

PREFIX = "base_model.model."
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj")
SHAPES = {MODULES[0]: (32, 32), MODULES[1]: (16, 32)}  # (out, in) in the tiny model


@dataclass
class Kit:
    """What the checks need: a folder for the cases, and a tiny model with its tokenizer."""

    root: Path
    count: int = 0
    cache: dict[str, Any] = field(default_factory=dict)

    def fresh(self) -> Path:
        """An empty folder; the one before goes."""
        shutil.rmtree(self.root / "case", ignore_errors=True)
        (self.root / "case").mkdir(parents=True)
        self.count += 1
        return self.root / "case"

    @cached_property
    def tokenizer(self) -> Any:
        from tests.tokenizer_fixture import tiny_tokenizer

        return tiny_tokenizer()

    @cached_property
    def model_folder(self) -> Path:
        from tests.model_folder import tiny_llama

        return tiny_llama(self.root / "tiny")

    @cached_property
    def model(self) -> Any:
        import lora_core as lc

        return lc.load_model(self.model_folder, dtype="float32")[0]


# ---- data files
PIECES = st.sampled_from(
    [
        b"\0",
        b"\xff",
        b"\xfe\xff",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"||",
        b",",
        b"\t",
        b'"',
        b"'",
        b"\r",
        b"\n",
        b"\r\n",
        b"a",
        b"prompt",
        b"completion",
        b"text",
        b"label",
        b"sentence",
        b"prompt,completion\n",
        b"text\tlabel\n",
        b"text\n",
        b" ",
        "é".encode("latin-1"),
        "é".encode(),
        "\u2028".encode(),
        "\U0001f600".encode(),
        b"x" * 1000,
        b"1",
        b"{}",
        b"[]",
        b"null",
        b'{"prompt": "a", "completion": "b"}\n',
        b'{"text": "a", "label": 1}\n',
        b'{"text": NaN}\n',
        b'{"text": "\\ud800"}\n',
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
        b"[" * 2000,
        b"9" * 5000,
        b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
        b'{"prompt": "a", "prompt": 1, "completion": "b"}\n',
        b"a||b\n",
    ]
)
ROW = {
    "prompt": "a",
    "completion": "b",
    "text": "c",
    "label": "d",
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    "chosen": "e",
    "rejected": "f",
}
BIG = st.sampled_from(
    [
        lambda: b"a||" + b"b" * 10_000_000,
        lambda: b"a||b\n" * 200_001,
        lambda: b"\n" * 5_000_000,
        lambda: b'"' * 300_000,
        lambda: b",".join([b"text", b"label", *[b"c"] * 40_000]) + b"\n",
        lambda: b"a||b\nc||" + b"d" * 99_000,
        lambda: b"a\n" * 500_000,
        lambda: b'{"text": ' + b"[" * 90_000,
        lambda: b'{"text": "a"}\n' * 150_000,
        lambda: b"prompt,completion\n" + b'"a\n' * 200_000,
        lambda: b"a||" + "é\u0301".encode() * 20_000 + b"\nb||c",
        lambda: b"q||a" + b" \xf0\x9f\x98\x80" * 15_000 + b"\nb||c",
        lambda: b"a\tb\n" * 100_000 + b'"',
    ]
)
NAMES = st.sampled_from(
    ["rows.txt", "rows.tsv", "rows.csv", "rows.jsonl", "ROWS.TXT", "r.jsonl.gz", "noending", "-.csv"]
)
KINDS = st.sampled_from(["file"] * 20 + ["folder", "loop", "pipe", "device", "nothing", "closed", "elsewhere"])


@st.composite
def data_cases(draw: st.DrawFn) -> dict[str, Any]:
    how = draw(st.integers(0, 30))
    if how == 0:
        content = draw(BIG)()
    elif how < 12:
        content = b"".join(draw(st.lists(PIECES, max_size=25)))
    elif how < 20:
        rows = draw(st.lists(st.one_of(changed(ROW), ANY), min_size=1, max_size=6))
        content = "\n".join(json.dumps(r, ensure_ascii=draw(st.booleans())) for r in rows).encode(
            "utf-8", "surrogatepass"
        )
    elif how < 25:
        text = draw(st.text(max_size=60)) + draw(st.sampled_from(["a||b\nc||d\n", "text,label\na,b\nc,d\n", ""]))
        encoding = draw(
            st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-7"])
        )
        content = text.encode(encoding, "ignore")
    else:
        content = draw(st.binary(max_size=120))
    return {
        "name": draw(NAMES),
        "content": content,
        "kind": draw(KINDS),
        "max_tokens": draw(st.sampled_from([2, 8, 256, 10**6])),
        "seed": draw(st.integers(0, 9)),
    }


def strange(path: Path, kind: str, content: bytes) -> None:
    """The file, or something else under its name."""
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "elsewhere":
        path.symlink_to("/etc/hostname")
    elif kind != "nothing":
        path.write_bytes(content)
        if kind == "closed":
            path.chmod(0)


def data_file(case: dict[str, Any], kit: Kit) -> None:
    from lora_core.evaluate import spread
    from lora_core.tasks import encode_many, load_data, preview

    path = kit.fresh() / case["name"]
    strange(path, case["kind"], case["content"])

    def read() -> Any:
        task = load_data(path, seed=case["seed"], tokenizer=kit.tokenizer, max_tokens=case["max_tokens"])
        encode_many(kit.tokenizer, spread(task.train, 256), task.template, case["max_tokens"])
        return task, preview(task, kit.tokenizer, 8, case["max_tokens"])

    found = told(read)
    if found is not None:
        task, rows = found
        assert task.train and task.test and all(r.completion.strip() for r in (*task.train[:50], *task.test[:50]))
        assert {r.key for r in task.train}.isdisjoint({r.key for r in task.test}) or task.remarks
        json.dumps(rows, allow_nan=False).encode()
        "".join(p["text"] for r in rows for p in r["pieces"]).encode()
