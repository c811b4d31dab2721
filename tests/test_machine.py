from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lora_core import machine
from lora_core.errors import UserError


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A home of its own and nothing remembered."""
    monkeypatch.setenv("LORA_LAB_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "_busy", lambda: False)
    machine._rates.cache_clear()
    yield tmp_path
    machine._rates.cache_clear()


def test_rate_is_measured_and_kept(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = machine.gemm_rate("float32", "cpu")
    assert first > 1e8  # any machine that runs torch at all
    kept = json.loads((fresh / "machine.json").read_text())
    (entry,) = kept.values()
    assert entry["rates"]["float32"] == first and entry["torch"] == torch.__version__
    machine._rates.cache_clear()
    monkeypatch.setattr(machine, "measure", lambda *_: pytest.fail("measured again"))
    assert machine.gemm_rate("float32", "cpu") == first


def test_a_rate_of_a_busy_machine_is_taken_again_and_the_better_one_counts(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([2e9, 1e9, 1e9, 3e9])  # float32 and bfloat16 while busy, then both again
    monkeypatch.setattr(machine, "measure", lambda *_: next(rates))
    monkeypatch.setattr(machine, "_busy", lambda: True)
    assert machine.gemm_rate("float32", "cpu") == 2e9
    machine._rates.cache_clear()
    monkeypatch.setattr(machine, "_busy", lambda: False)
    assert (machine.gemm_rate("float32", "cpu"), machine.gemm_rate("bfloat16", "cpu")) == (2e9, 3e9)
    machine._rates.cache_clear()
    assert machine.gemm_rate("float32", "cpu") == 2e9, "quiet the second time: it is kept"


def test_other_threads_are_another_machine(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measure(dtype: str, on: str) -> float:
        asked.append(dtype)
        return 1e9 * len(asked)

    monkeypatch.setattr(machine, "measure", measure)
    known = machine.fingerprint()
    monkeypatch.setattr(machine, "fingerprint", lambda: known)
    machine.gemm_rate("float32", "cpu")
    monkeypatch.setattr(machine, "fingerprint", lambda: {**known, "threads": 99})
    machine.gemm_rate("float32", "cpu")
    assert asked == ["float32", "bfloat16"] * 2
    assert len(json.loads((fresh / "machine.json").read_text())) == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"x": 1}'])
def test_a_damaged_note_is_measured_again(fresh: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (fresh / "machine.json").write_text(text)
    monkeypatch.setattr(machine, "measure", lambda *_: 5e9)
    assert machine.gemm_rate("bfloat16", "cpu") == 5e9


def test_a_home_that_cannot_be_written_is_no_obstacle(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_LAB_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(machine, "measure", lambda *_: 7e9)
    assert machine.gemm_rate("float32", "cpu") == 7e9


@pytest.mark.parametrize(("bf16", "best"), [(4e9, "float32"), (1.1e11, "float32"), (3e11, "bfloat16")])
def test_bfloat16_only_where_it_is_clearly_faster(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, bf16: float, best: str
) -> None:
    monkeypatch.setattr(machine, "measure", lambda dtype, on: {"float32": 1e11, "bfloat16": bf16}[dtype])
    assert machine.best_dtype("cpu") == best
    assert machine.pick_dtype("auto", "cpu") == best


def test_settings_that_are_not_possible() -> None:
    with pytest.raises(UserError, match="no dtype 'float16'; possible: auto float32 bfloat16"):
        machine.pick_dtype("float16")
    with pytest.raises(UserError, match="no device 'gpu'; possible: auto cpu cuda mps"):
        machine.pick_device("gpu")
    with pytest.raises(UserError, match="no device 'cuda:99' on this machine"):
        machine.pick_device("cuda:99")
    assert machine.pick_device("cpu") == "cpu"


def test_fingerprint_and_memory() -> None:
    known = machine.fingerprint()
    assert set(known) == {"chip", "isa", "threads", "torch"}
    assert known["chip"] and known["threads"] >= 1
    before = machine.peak_bytes()
    block = torch.ones(64 << 20, dtype=torch.uint8)  # 64 MiB, touched
    assert machine.peak_bytes() >= before > 1 << 20
    assert int(block.sum()) == 64 << 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heaps")
@pytest.mark.parametrize("few", [True, False])
def test_threads_share_two_heaps(few: bool) -> None:
    script = f"""
import ctypes, sys, threading
from lora_core.machine import few_heaps, give_back
if {few}:
    few_heaps()
met = threading.Barrier(6)
def work():
    kept = [bytes(100_000) for _ in range(50)]
    met.wait()
threads = [threading.Thread(target=work) for _ in range(6)]
for t in threads: t.start()
for t in threads: t.join()
give_back()
libc = ctypes.CDLL("libc.so.6")
libc.fdopen.restype = ctypes.c_void_p
libc.malloc_info(0, ctypes.c_void_p(libc.fdopen(1, b"w")))
libc.fflush(None)
"""
    said = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True).stdout
    heaps = said.count("<heap nr=")
    assert heaps <= 2 if few else heaps > 2, heaps
