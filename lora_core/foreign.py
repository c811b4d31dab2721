"""Opening what others have made: PEFT folders, single files, kohya's and diffusers' names, whole checkpoints, zips.

    opened = open_any("style.safetensors")        # Opened: its factors as `read_adapter` gives them, its metadata
    lc.spectra(opened.stored)

Everything is read as data: safetensors' headers strictly, JSON up to a size, zips member by member into a folder of
the caller's. Pickles are refused, whatever they are called. No torch, no model, no network.
"""

from __future__ import annotations

import lzma
import shutil
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_core.difference import Difference, find_base
from lora_core.errors import UserError
from lora_core.home import writing
from lora_core.peft_format import CONFIG, LAB, WEIGHTS
from lora_core.stored import Stored
from lora_core.weights import INDEX, ONE, Weights, read_header

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy")
WANTED = (".safetensors", ".json")
MAX_UNPACKED = 4 << 30  # bytes of a zip's members together
MAX_RATIO = 100  # of a zip's own size: weights hardly shrink, and nothing but a bomb unpacks to more
MAX_MEMBERS = 2000
MAX_TEXT = 2000  # characters of one value of the metadata that are kept
MAX_VALUES = 200
# what zipfile raises for bytes that are no zip's, from its list of members to what it unpacks with
BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, NotImplementedError, RuntimeError, EOFError,
              IndexError, ValueError)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What was opened.

    kind        "PEFT", "kohya" or "diffusers" for factors; "checkpoint" for a whole model beside its base
    stored      the factors, as `read_adapter` gives them; None for a checkpoint
    difference  W − W0 of a checkpoint, matrix by matrix; else None
    base        the base model as it names itself, or as it was given; None where nothing says it
    metadata    what the file says of itself, as text
    remarks     what is to be known of what is shown
    """

    kind: str
    stored: Stored | None = None
    difference: Difference | None = None
    base: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def open_any(path: str | Path, *, base: str | Path | None = None, scratch: str | Path | None = None) -> Opened:
    """An adapter or a checkpoint as data.

    path     a folder in PEFT's format; a .safetensors file with LoRA factors by PEFT's, kohya's or diffusers' names; a
             whole model's .safetensors file or folder; a .zip of any of these
    base     of a whole model: the folder or name of the model that it was tuned from; without it, whichever model on
             this machine has its matrices
    scratch  a folder to unpack a .zip into; without it, a .zip is refused

    Raises UserError for anything else, for a pickle, and for files that are not what they say.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path, base)
    if not path.is_file():
        raise UserError(f"there is nothing at {path}; give a folder, a .safetensors file or a .zip")
    with path.open("rb") as f:
        head = f.read(8)
    if head[:4] == b"PK\x03\x04":
        if scratch is None:
            raise UserError(f"{path} is a zip; unpack it first")
        return _folder(unpack(path, Path(scratch)), base)
    refuse_pickle(path, head)
    if path.suffix.lower() != ".safetensors":
        raise UserError(f"{path} is no adapter: what can be opened is .safetensors, an adapter's folder, or its .zip")
    return _file(path, base)


def refuse_pickle(path: Path, head: bytes = b"") -> None:
    """UserError for a pickle, by its name or its first bytes."""
    if path.suffix.lower() in PICKLES or head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        raise UserError(
            f"{path.name} is a pickle, which can run code when it is opened, so it is not; save it as safetensors"
        )


def _folder(folder: Path, base: str | Path | None) -> Opened:
    from lora_core.files import read_adapter

    if (folder / CONFIG).exists():
        stored = read_adapter(folder)
        said = {k: _text(v) for k, v in stored.config.items() if v not in (None, {}, [], "")}
        remarks: tuple[str, ...] = ()
        if stored.dora:
            remarks = ("it is DoRA's: shown is s·B·A, since the rest of its ΔW takes W0 to know",)
            stored = replace(stored, sites={k: replace(s, m=None) for k, s in stored.sites.items()})
        if stored.copies:
            remarks += (f"{len(stored.copies)} parameters were trained themselves; they have no low-rank update",)
        return Opened(kind="PEFT", stored=stored, base=stored.base, remarks=remarks,
                      metadata=_metadata(said | read_header(folder / WEIGHTS).metadata))  # fmt: skip
    if (folder / ONE).exists() or (folder / INDEX).exists():
        return _checkpoint(folder, base)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return _file(files[0], base)
    for file in sorted(folder.iterdir()):
        if file.is_file():
            refuse_pickle(file)
    if not files:
        raise UserError(f"{folder} holds no safetensors; an adapter's folder has {CONFIG} and {WEIGHTS}")
    raise UserError(f"{folder} holds {len(files)} safetensors files; give the one that is meant")


def _file(path: Path, base: str | Path | None) -> Opened:
    from lora_core.single_file import is_lora, read_file

    header = read_header(path)
    if not is_lora(header.entries):
        return _checkpoint(path, base)
    stored, convention, remarks = read_file(path, header)
    return Opened(kind=convention, stored=stored, base=stored.base, metadata=_metadata(header.metadata),
                  remarks=tuple(remarks))  # fmt: skip


def _checkpoint(path: Path, base: str | Path | None) -> Opened:
    tuned = Weights(path)
    name, folder = _base(path, tuned, base)
    if folder.resolve() == path.resolve():
        raise UserError(f"{path} is the base itself; its difference to itself is nothing")
    difference = Difference(path, tuned, Weights(folder))
    remarks = ()
    if difference.left:
        remarks = (f"{len(difference.left)} of its tensors are vectors or not in {name}, and are left out",)
    return Opened(kind="checkpoint", difference=difference, base=name, metadata=_metadata(tuned.metadata),
                  remarks=remarks)  # fmt: skip


def _base(path: Path, tuned: Weights, base: str | Path | None) -> tuple[str, Path]:
    """(name, folder) of a checkpoint's base."""
    from lora_core.base_files import folder_here
    from lora_core.models import registry

    if base is not None:
        folder = folder_here(str(base))
        if folder is None:
            raise UserError(f"the base model '{base}' is not on this machine; give its folder, or a name of those here")
        return str(base), folder
    here = {m.name: folder for m in registry() if m.cached and (folder := folder_here(m.name)) is not None}
    name = find_base(tuned, here)
    if name is None:
        raise UserError(f"{path.name} is a whole model, not an adapter: what can be shown is its difference to its"
                        f" base, and no model here ({' '.join(here) or 'there is none'}) has its matrices")  # fmt: skip
    return name, here[name]


# ---- zips ----------------------------------------------------------------------------------------------------------
def unpack(path: Path, into: Path) -> Path:
    """The folder with what is wanted of a zip: its safetensors and JSON files, by their own names, bounded in size.

    Of an archive with several folders the one that has an adapter's config is meant, else the first with weights.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if not m.is_dir()]
            if len(members) > MAX_MEMBERS:
                raise UserError(f"{path.name} has {len(members):,} members; at most {MAX_MEMBERS:,} are looked at")
            names = [m.filename.replace("\\", "/") for m in members]
            if any(n.rpartition("/")[2] == "data.pkl" for n in names):
                refuse_pickle(Path(path.name).with_suffix(".pt"))
            where = next((n.rpartition("/")[0] for n in names if n.rpartition("/")[2] == CONFIG), None)
            if where is None:
                where = next((n.rpartition("/")[0] for n in names if n.endswith(".safetensors")), None)
            if where is None:
                for n in names:
                    refuse_pickle(Path(n.rpartition("/")[2]))
                raise UserError(f"{path.name} holds no safetensors file")
            room = min(MAX_UNPACKED, MAX_RATIO * path.stat().st_size + (1 << 20))
            with writing(into):
                into.mkdir(parents=True, exist_ok=True)
            for member, name in zip(members, names):
                folder, _, last = name.rpartition("/")
                if folder == where and last.endswith(WANTED) and not last.startswith("."):
                    room -= _member(archive, member, into / Path(last).name, room)
    except UserError:
        raise
    except (*BROKEN_ZIP, OSError) as error:
        raise UserError(f"{path.name} cannot be unpacked: {str(error)[:120] or type(error).__name__}") from None
    return into


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, to: Path, room: int) -> int:
    """Unpack one member, counting what comes out rather than what the archive says; gives its size."""
    count = 0
    with archive.open(member) as source, writing(to.parent), to.open("wb") as target:
        while chunk := source.read(1 << 20):
            count += len(chunk)
            if count > room:
                raise UserError(f"the zip unpacks to more than {MAX_UNPACKED >> 30} GiB, or {MAX_RATIO} times its size")
            target.write(chunk)
    return count


# ---- metadata ------------------------------------------------------------------------------------------------------
def _metadata(found: Mapping[str, str]) -> dict[str, str]:
    """As text, short enough to be shown."""
    return {str(k)[:200]: _text(v) for k, v in list(found.items())[:MAX_VALUES]}


def _text(value: object) -> str:
    import json

    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def clear(folder: Path) -> None:
    """Remove what `open_any` unpacked."""
    shutil.rmtree(folder, ignore_errors=True)


# the names of what may belong to an adapter's folder, for whoever collects its files one by one
PARTS = (CONFIG, WEIGHTS, LAB)
