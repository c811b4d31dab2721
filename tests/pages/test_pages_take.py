"""Take it with you: what is downloaded is the run, readable by those that it is meant for."""

from __future__ import annotations

import csv
import io
import struct
import zipfile
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.runs import tensorboard
from app.runs.run import Run
from app.runs.store import RunStore
from tests.pages_kit import ask, say


def test_the_checksum_is_crc32c() -> None:
    """Vectors of RFC 3720, appendix B.4, and of the catalogue of CRCs."""
    assert tensorboard.crc32c(b"123456789") == 0xE3069283
    assert tensorboard.crc32c(bytes(32)) == 0x8A9136AA
    assert tensorboard.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert tensorboard.crc32c(bytes(range(32))) == 0x46DD794E


def records(data: bytes) -> list[bytes]:
    """The records of a TFRecord file, each checksum checked."""
    found = []
    while data:
        head, (length,) = data[:8], struct.unpack("<Q", data[:8])
        body, rest = data[12 : 12 + length], data[12 + length :]
        for part, stored in ((head, data[8:12]), (body, rest[:4])):
            assert tensorboard.masked(part) == stored
        found.append(body)
        data = rest[4:]
    return found


def fields(data: bytes) -> dict[int, list[bytes | int]]:
    """A protocol buffer, read without knowing its message: {field: values}."""
    found: dict[int, list[bytes | int]] = {}

    def number() -> int:
        nonlocal data
        value = shift = 0
        while True:
            byte, data = data[0], data[1:]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while data:
        key = number()
        size = {0: 0, 1: 8, 5: 4}.get(key & 7)
        if size == 0:
            found.setdefault(key >> 3, []).append(number())
            continue
        size = number() if size is None else size
        found.setdefault(key >> 3, []).append(data[:size])
        data = data[size:]
    return found


def read(data: bytes) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value)]} of an event file."""
    first, *rest = (fields(r) for r in records(data))
    assert first[3] == [b"brain.Event:2"]
    out: dict[str, list[tuple[int, float]]] = {}
    for event in rest:
        step = event[2][0]
        for value in fields(event[5][0])[1]:  # type: ignore[arg-type]
            one = fields(value)  # type: ignore[arg-type]
            out.setdefault(one[1][0].decode(), []).append((step, struct.unpack("<f", one[2][0])[0]))  # type: ignore
    return out


def test_the_curve_for_tensorboard_and_as_csv(page: TestClient, run: Run, store: RunStore, tmp_path: Path) -> None:
    answer = page.get(f"/lab/api/take/tensorboard?run={run.id}")
    assert "events.out.tfevents." in answer.headers["content-disposition"]
    tags = read(answer.content)
    events = store.events(run.id)
    steps = [e for e in events if e["kind"] == "step"]
    assert tags["loss/training"] == [(e["step"], pytest.approx(e["loss"])) for e in steps]
    held = [(e["step"], e["held_loss"]) for e in events if e["kind"] in ("base", "held")]
    assert [s for s, _ in tags["loss/held_out"]] == [s for s, _ in held] and held[0][0] == 0
    assert tags["update_norm/largest"][-1][1] > 0 and "learning_rate" in tags
    rows = list(csv.reader(io.StringIO(page.get(f"/lab/api/take/curve.csv?run={run.id}").text)))
    assert rows == [[("" if v is None else str(v)) for v in row] for row in ask(page, "run", run=run.id)["rows"]]
    # and with TensorBoard's own reader, where that is installed
    try:
        from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-not-found]
            EventAccumulator,
        )
    except ImportError:
        return
    (tmp_path / "events.out.tfevents.1.x").write_bytes(answer.content)
    theirs = EventAccumulator(str(tmp_path)).Reload()
    assert [(s.step, s.value) for s in theirs.Scalars("loss/training")] == tags["loss/training"]


def test_the_merged_model_is_a_plain_one(page: TestClient, run: Run, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    import lora_core as lc

    assert "not merged yet" in page.get(f"/lab/api/take/merged.zip?run={run.id}").json()["error"]
    answer = say(page, "merge", run=run.id)
    data = page.get(f"/lab/api/{answer['file']}").content
    assert len(data) == answer["bytes"] == say(page, "merge", run=run.id)["bytes"]
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        z.extractall(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / f"run-{run.id}-merged").eval()
    base, _ = lc.load_model(run.request.model, dtype="float32")
    assert run.adapter is not None
    lc.load_adapter(base, run.adapter)
    ids = torch.tensor([[1, 5, 9, 7]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, base(ids).logits, atol=1e-5, rtol=1e-4)


def test_what_is_not_there_cannot_be_taken(page: TestClient) -> None:
    assert "no run" in page.get("/lab/api/take/curve.csv?run=999").json()["error"]
    assert "no run" in say(page, "merge", run=999)["error"]
    assert page.get("/lab/api/take/else?run=1").status_code == 404
