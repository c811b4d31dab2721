from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from lora_core.errors import UserError
from lora_core.home import home, home_path, read_json, write_json, writing


def test_environment_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORA_LAB_HOME", str(tmp_path / "a" / "b"))
    assert not (tmp_path / "a").exists()
    assert home_path() == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()  # looking makes nothing
    assert home() == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()


def test_without_it_the_platforms_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LORA_LAB_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home_path().is_relative_to(tmp_path)
    assert "lora-lab" in str(home_path())


def test_a_file_in_the_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("LORA_LAB_HOME", str(tmp_path / "taken" / "deeper"))
    with pytest.raises(UserError, match="cannot write to .*deeper: a file is in the way.*LORA_LAB_HOME") as caught:
        home()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EROFS, "read-only"), (errno.ENOSPC, "disk is full"), (errno.EACCES, "no permission")],
)
def test_a_disk_that_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, words: str) -> None:
    monkeypatch.setenv("LORA_LAB_HOME", str(tmp_path / "home"))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=words):
        home()


def test_writing_knows_safetensors_words_and_lets_other_errors_through() -> None:
    with pytest.raises(UserError, match="disk is full"), writing("there"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(KeyError), writing("there"):
        raise KeyError("x")
    with pytest.raises(OSError) as caught, writing("there"):
        raise OSError(errno.EIO, "broken")
    assert not isinstance(caught.value, UserError)


def test_json_is_replaced_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_json(file, {"a": 2})
    assert read_json(file) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]  # nothing half-written stays


def test_read_json_is_bounded_and_forgiving(tmp_path: Path) -> None:
    assert read_json(tmp_path / "absent.json") is None
    (tmp_path / "bad.json").write_text("{")
    assert read_json(tmp_path / "bad.json") is None
    (tmp_path / "long.json").write_text(json.dumps("x" * 100))
    assert read_json(tmp_path / "long.json", limit=50) is None
    assert read_json(tmp_path / "long.json") == "x" * 100
