"""Adapters from elsewhere, opened in Spectra: streamed to a folder of ours, bounded, read as data, swept after a day.

The page sends the files of one adapter one after the other into a set, and then asks for the set to be opened. A set
is known by a random id; what cannot be opened is removed at once.
"""

from __future__ import annotations

import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.pages import owners
from app.pages.uploads import ID, OLD_S, safe_name, swept
from app.pages.visitor import asking
from lora_core.errors import UserError
from lora_core.home import read_json, write_json, writing

if TYPE_CHECKING:
    from app.pages.lab import Lab
    from lora_core.foreign import Opened

MOST_FILES = 60  # of one set
TAIL, MAX_LIST = 70_000, 1 << 20  # bytes at the end of a zip where its list is named, and of the list itself
NEVER_S = 3600.0  # since its last file came, of a set that nobody opened
TAKEN = (".safetensors", ".json", ".zip")
ABOUT = "about.json"


class Sets:
    """The folder `opened` of whoever asks: one folder a set, with its files and what it is called."""

    def __init__(self, home: Path) -> None:
        self.home = home

    @property
    def root(self) -> Path:
        return owners.folder(self.home) / "opened"

    async def take(self, set_id: str, name: str, chunks: AsyncIterator[bytes]) -> str:
        """The id of the set that the file went into: the one given, or a new one for "".

        Raises UserError for a pickle, before any of it is kept; for another ending, too much, too many, a full disk.
        """
        from lora_core.foreign import refuse_pickle

        clean = safe_name(name)
        refuse_pickle(Path(clean))
        if Path(clean).suffix.lower() not in TAKEN:
            raise UserError(f"{clean} is no part of an adapter; those are .safetensors and .json, or a .zip of both")
        folder = self._folder(set_id) if set_id else self._new()
        fresh = not set_id
        if (folder / "files" / clean).exists():
            raise UserError(f"{clean} is there twice; an adapter has one file of a name")
        try:
            quota = owners.quota()
            owners.room_for_all(self.home)
            room = min(quota.set_bytes - self._size(folder), quota.all_sets - self._size(self.root))
            if len(list((folder / "files").iterdir())) >= MOST_FILES:
                raise UserError(f"an adapter has a few files; of one set at most {MOST_FILES} are taken")
            await self._write(folder / "files" / clean, chunks, room)
        except BaseException:
            (folder / "files" / clean).unlink(missing_ok=True)
            if fresh:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder.name

    async def _write(self, path: Path, chunks: AsyncIterator[bytes], room: int) -> None:
        from lora_core.foreign import refuse_pickle

        count, quota = 0, owners.quota()
        with writing(self.root), open(path, "xb") as file:
            async for chunk in chunks:
                if count == 0 and path.suffix.lower() != ".zip":
                    refuse_pickle(path, bytes(chunk[:8]))
                count += len(chunk)
                if count > room:
                    raise UserError(f"{path.name} is too large: one adapter may have {quota.set_bytes >> 20} MiB, and"
                                    f" all that are opened in a day {quota.all_sets >> 20}")  # fmt: skip
                file.write(chunk)

    def _new(self) -> Path:
        self.sweep()
        folder = self.root / secrets.token_hex(8)
        with writing(self.root):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            kept = sorted((p for p in self.root.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime)
            for old in kept[: max(0, len(kept) - owners.quota().sets + 1)]:  # the oldest has long been left
                shutil.rmtree(old, ignore_errors=True)
            (folder / "files").mkdir(mode=0o700, parents=True)
        return folder

    def _folder(self, set_id: str) -> Path:
        folder = self.root / set_id
        if not ID.fullmatch(set_id) or not folder.is_dir():
            raise UserError("what was opened is no longer here; open it again")
        return folder

    def has(self, set_id: str) -> bool:
        """Whether a set is still here."""
        return bool(ID.fullmatch(set_id)) and (self.root / set_id / ABOUT).is_file()

    def _size(self, folder: Path) -> int:
        return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())

    def sweep(self, older_s: float = OLD_S) -> None:
        """Remove what is older than a day, of everybody."""
        for place in owners.folders(self.home):
            swept(place / "opened", older_s)
            for files in (place / "opened").glob("*/files"):  # sent, and never opened
                with suppress(OSError):
                    if not (files.parent / ABOUT).exists() and time.time() - files.stat().st_mtime > NEVER_S:
                        shutil.rmtree(files.parent, ignore_errors=True)

    # ---- opening
    def open(self, set_id: str, name: str = "", base: str | None = None) -> tuple[Opened, str]:
        """(what is in a set, what it is called). The first time `name` is noted; a set that cannot be opened goes."""
        folder = self._folder(set_id)
        about = read_json(folder / ABOUT)
        first = not isinstance(about, dict)
        if first:
            about = {"name": shorter(name), "base": base}
            with writing(self.root):
                write_json(folder / ABOUT, about)
        try:
            return self._read(folder, about.get("base")), str(about["name"])
        except UserError as error:
            if first:
                shutil.rmtree(folder, ignore_errors=True)
            raise UserError(plain(str(error), folder)) from None

    def rebase(self, set_id: str, base: str) -> None:
        """Another base for a whole model that was opened. UserError, and the old one stays, where it does not fit."""
        folder = self._folder(set_id)
        try:
            self._read(folder, base)
        except UserError as error:
            raise UserError(plain(str(error), folder)) from None
        with writing(self.root):
            write_json(folder / ABOUT, {**read_json(folder / ABOUT), "base": base})

    def _read(self, folder: Path, base: str | None) -> Opened:
        from lora_core.foreign import open_any

        files, unpacked = sorted((folder / "files").iterdir()), folder / "unpacked"
        if unpacked.is_dir():
            return open_any(unpacked, base=base)
        zips = [p for p in files if p.suffix.lower() == ".zip"]
        if len(files) == 1 and zips:
            bounded(zips[0])
            found = open_any(zips[0], base=base, scratch=unpacked)
            if unpacked.is_dir():
                zips[0].unlink()
            return found
        return open_any(files[0] if len(files) == 1 else folder / "files", base=base)

    def listed(self) -> list[dict[str, str]]:
        """[{"id", "name"}] of what was opened, the newest first."""
        found = []
        with suppress(OSError):
            for folder in sorted(self.root.iterdir(), key=lambda p: -p.stat().st_mtime):
                about = read_json(folder / ABOUT)
                if isinstance(about, dict):
                    found.append({"id": folder.name, "name": str(about.get("name", ""))})
        return found


def bounded(path: Path) -> None:
    """UserError for a zip whose list of members is too long to be read, or whose members are too large together."""
    import zipfile

    from lora_core.foreign import BROKEN_ZIP

    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    length = int.from_bytes(tail[at + 12 : at + 16], "little") if at >= 0 else 0
    if length > MAX_LIST or tail[max(0, at - 20) : at].startswith(b"PK\x06\x07"):
        raise UserError(f"{path.name} has more members than an adapter's zip")
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(m.file_size for m in archive.infolist())
    except (*BROKEN_ZIP, OSError):
        raise UserError(f"{path.name} cannot be unpacked: it is no zip") from None
    if total > owners.quota().set_bytes:
        raise UserError(f"{path.name} unpacks to {total >> 20:,} MiB; one adapter may have "
                        f"{owners.quota().set_bytes >> 20:,}")  # fmt: skip


def plain(text: str, folder: Path) -> str:
    """A message without the place of our folders: a file is called as its owner calls it."""
    for place in (folder / "files", folder / "unpacked", folder):
        text = text.replace(f"{place}/", "").replace(str(place), "it")
    return text


def shorter(name: str) -> str:
    """What a set is called: the file's or the folder's own name, without its ending."""
    last = re.split(r"[\\/]", name.strip())[-1]
    last = re.sub(r"\.(safetensors|zip)$", "", last, flags=re.I)
    return "".join(c for c in last if c.isprintable())[:60] or "an adapter"


# ---- the page's questions
def opened(lab: Lab, body: Mapping[str, Any]) -> dict[str, Any]:
    """Open a set: {"open": its id, "name"}. body: set, name, and base for a whole checkpoint."""
    from app.pages.sources import forget, source

    given, set_id = body.get("base"), str(body.get("set", ""))
    base = given.strip() if isinstance(given, str) and given.strip() else None
    if base and not asking.get().sees_all and base not in bases():
        return {"error": f"'{base[:60]}' is not among the models here: {' '.join(bases())}", "field": "base"}
    try:
        if base and lab.sets.has(set_id):
            lab.sets.rebase(set_id, base)
            forget(set_id)
        _, name = lab.sets.open(set_id, str(body.get("name", "")), base)
        source(lab, {"open": set_id})  # what cannot be looked at is told now
    except UserError as error:
        if "base" in str(error):  # the page asks for one
            return {"error": str(error), "field": "base"}
        raise
    return {"open": set_id, "name": name}


def list_opened(lab: Lab, query: Mapping[str, Any]) -> dict[str, Any]:
    """What was opened, and the models of this machine that a whole model may be held against."""
    return {"opened": lab.sets.listed(), "bases": bases()}


def bases() -> list[str]:
    from lora_core.models import registry

    return [m.name for m in registry() if m.cached]
