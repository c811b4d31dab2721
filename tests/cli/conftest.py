"""A tiny model, rows, and one command line in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from app import cli
from tests.cli_kit import ROWS, Call
from tests.model_folder import tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs one command line in this process, with a home of its own: (exit status, stdout, stderr)."""
    monkeypatch.setenv("LORA_LAB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("lora_core.machine.measure", lambda dtype, on="cpu": {"float32": 1e11, "bfloat16": 1e10}[dtype])

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.run([str(w) for w in words])
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.txt"
    file.write_text(ROWS)
    return file
