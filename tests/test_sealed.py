"""Checkpoints that show whether they are whole: with one flipped bit or missing byte, anywhere, they are not used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from app.runs.folder import CHECKPOINT
from app.runs.process import STOP
from app.runs.store import RunStore
from app.runs.worker import run_here
from lora_core.home import write
from lora_core.sealed import before, damaged, newest, put_aside, read_state, remove, save_sealed
from tests.runs_kit import StandIn, adapter_sum, request


def saved(folder: Path, step: int = 5, n: int = 40) -> Path:
    file = folder / "c.safetensors"
    save_sealed(file, {"x": np.arange(n, dtype="f4"), "y": np.zeros(3, "u1")}, {"step": step, "sha256": '"sha256":"'})
    return file


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    file = saved(tmp_path)
    whole = file.read_bytes()
    assert read_state(file) == {"step": 5, "sha256": '"sha256":"'}
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        assert read_state(file) is None, at
    for end in (*range(0, len(whole), 7), len(whole) - 1):
        file.write_bytes(whole[:end])
        assert read_state(file) is None, end
    file.write_bytes(whole + b"x")
    assert read_state(file) is None
    file.write_bytes(whole)
    assert read_state(file)


def test_torchs_tensors_and_numpys_are_read_by_safetensors(tmp_path: Path) -> None:
    import torch
    from safetensors import safe_open

    save_sealed(tmp_path / "t", {"a": torch.arange(5), "b": torch.ones(2, 2, dtype=torch.bfloat16)}, {"step": 1})
    with safe_open(str(tmp_path / "t"), "pt") as f:
        assert torch.equal(f.get_tensor("a"), torch.arange(5)) and f.metadata()["state"] == '{"step": 1}'
    assert newest(tmp_path / "t")


def test_the_one_before_is_taken_and_the_damaged_one_put_aside(tmp_path: Path) -> None:
    file = saved(tmp_path, 5)
    saved(tmp_path, 10)
    found = newest(file)
    assert found and found.step == 10 and read_state(before(file)) == {"step": 5, "sha256": '"sha256":"'}
    with open(file, "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\xff")
    found = newest(file)
    assert found and (found.step, found.path) == (5, before(file))
    assert put_aside(file) and damaged(file).exists() and not file.exists() and not put_aside(file)
    before(file).write_bytes(b"torn")
    assert newest(file) is None
    saved(tmp_path, 15)
    remove(file)
    assert sorted(p.name for p in tmp_path.iterdir()) == [damaged(file).name]


def test_one_without_a_digest_is_looked_at_as_far_as_that_goes(tmp_path: Path) -> None:
    from safetensors.numpy import save

    data = save({"x": np.zeros(9, "f4")}, {"state": json.dumps({"step": 7})})
    (tmp_path / "old").write_bytes(data)
    assert read_state(tmp_path / "old") == {"step": 7}
    for wrong in (data[:-1], data + b"x", b"\xff" * 100, b"", save({"x": np.zeros(9)}, {"state": "[1]"}), save({})):
        (tmp_path / "old").write_bytes(wrong)
        assert read_state(tmp_path / "old") is None, wrong[:20]


def test_no_room_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(tmp_path, 5)
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            saved(tmp_path, 10)
        found = newest(file)
        assert found and found.step == 5 and [p.name for p in tmp_path.iterdir()] == [file.name]
    write(tmp_path / "a", b"one", memoryview(b"two"))
    assert (tmp_path / "a").read_bytes() == b"onetwo"


@pytest.mark.parametrize("which", ["last", "both"])
def test_a_run_never_goes_on_from_wrong_numbers(tmp_path: Path, which: str) -> None:
    store = RunStore(tmp_path)
    run = store.create(request(steps=20))

    def press(event: dict) -> None:
        if event["kind"] == "step" and event["step"] == 13:
            (run.folder / STOP).touch()

    run_here(store, run.id, press, session=StandIn)
    file = run.folder / CHECKPOINT
    assert newest(file) and newest(before(file))
    for path in (file, before(file))[: 1 if which == "last" else 2]:
        data = bytearray(path.read_bytes())
        data[data.index(b'\\"sum\\": ') + 9] ^= 1  # another sum, and else all right
        path.write_bytes(data)
    said: list[str] = []
    run = run_here(store, run.id, lambda e: said.append(e.get("message") or ""), session=StandIn)
    assert run.status == "done" and adapter_sum(run.folder) == 210
    assert [e["step"] for e in store.events(run.id) if e["kind"] == "step"] == list(range(1, 21))
    goes = "goes on from step 5" if which == "last" else "begins anew"
    assert any("damaged" in s and goes in s for s in said), said
