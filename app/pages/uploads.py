"""The user's own files: taken in by a route of ours, bounded in size, number and name, kept in a folder of ours.

An upload is known by a random id, in a folder of whoever sent it. A run copies its file into its own folder, so
uploads are swept after a day.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

from app.pages import owners
from lora_core.errors import UserError, unknown
from lora_core.home import writing

OLD_S, BROKEN_S = 86_400.0, 300.0
PART = ".part"  # the name of a file that is still coming
LOOK = 4 << 20  # bytes between two looks at what else was sent meanwhile
SALT = secrets.token_bytes(16)
ID = re.compile(r"[0-9a-f]{16}")


class Uploads:
    """The folder `uploads` of whoever asks: one folder an upload, with one file in it."""

    def __init__(self, home: Path) -> None:
        self.home = home

    @property
    def root(self) -> Path:
        return owners.folder(self.home) / "uploads"

    async def take(self, name: str, chunks: AsyncIterator[bytes]) -> tuple[str, str]:
        """(id, name) of a new upload. Raises UserError for a wrong ending, too much, too many, or a full disk."""
        from lora_core.tasks.data_files import EXTENSIONS, MOST_BYTES

        clean = safe_name(name)
        if Path(clean).suffix.lower() not in EXTENSIONS:
            raise unknown("reader for files that end in", Path(clean).suffix or clean, EXTENSIONS)
        self.sweep()
        self._room(files=1)
        owners.room_for_all(self.home)
        id = secrets.token_hex(8)
        folder = self.root / id
        try:
            with writing(self.root):
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
                folder.mkdir(mode=0o700)
                count = looked = 0
                part = folder / PART
                with open(part, "wb") as file:
                    async for chunk in chunks:
                        count += len(chunk)
                        if count > MOST_BYTES:
                            raise UserError(f"{clean} is larger than {MOST_BYTES >> 20} MB; give a smaller file")
                        if count - looked >= LOOK or not looked:
                            looked = count
                            self._room(bytes=len(chunk))
                            owners.room_for_all(self.home)
                        file.write(chunk)
                self._room()
                part.rename(folder / clean)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return id, clean

    def adopt(self, path: Path, name: str) -> tuple[str, str]:
        """(id, name) of a copy of a run's file, so that the form can be filled with that run again."""
        clean = safe_name(name)
        stat = path.stat()
        mark = f"{path}:{stat.st_ino}:{stat.st_mtime_ns}:{owners.owner()}".encode()
        id = hashlib.blake2b(mark, digest_size=8, key=SALT).hexdigest()  # the same form, the same copy
        folder = self.root / id
        with suppress(UserError):
            kept = self.path(id)
            folder.touch()
            return id, kept.name
        self._room(1, stat.st_size)
        with writing(self.root):
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                shutil.copyfile(path, folder / clean)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return id, clean

    def path(self, id: str) -> Path:
        """The file of an upload; UserError when there is none of that id (any more)."""
        files = list((self.root / id).iterdir()) if ID.fullmatch(id) and (self.root / id).is_dir() else []
        if len(files) != 1 or files[0].name == PART:
            raise UserError("that file is no longer here; choose it again")
        return files[0]

    def sweep(self, older_s: float = OLD_S) -> None:
        """Remove what is older than a day, of everybody, and what was broken off."""
        for place in owners.folders(self.home):
            swept(place / "uploads", older_s)
            for part in (place / "uploads").glob(f"*/{PART}"):
                with suppress(OSError):
                    if time.time() - part.stat().st_mtime > BROKEN_S:
                        shutil.rmtree(part.parent, ignore_errors=True)

    def _room(self, files: int = 0, bytes: int = 0) -> None:
        """UserError where whoever asks would have more than they may with so many more files and bytes."""
        sizes, quota = [], owners.quota()
        for path in self.root.glob("*/*"):
            with suppress(OSError):
                sizes.append(path.stat().st_size)
        if len(sizes) + files > quota.files:
            raise UserError(f"{len(sizes)} files of yours are here already; at most {quota.files} are kept for a day")
        if sum(sizes) + bytes > quota.bytes:
            raise UserError(f"the files of one day may have {quota.bytes >> 20} MB together; yours would have more")


def swept(root: Path, older_s: float) -> int:
    """Remove the folders below root that nobody has used for so long; how many those were."""
    found = 0
    with suppress(OSError):
        for folder in root.iterdir():
            with suppress(OSError):
                if time.time() - folder.stat().st_mtime > older_s:
                    shutil.rmtree(folder, ignore_errors=True) if folder.is_dir() else folder.unlink(missing_ok=True)
                    found += 1
    return found


def safe_name(name: str) -> str:
    """A file's own name: no folder, plain letters, not long. "a/b/My data?.txt" becomes "My data_.txt"."""
    last = re.split(r"[\\/]", name)[-1].strip()
    stem, dot, suffix = last.rpartition(".")
    clean = re.sub(r"[^\w .()+-]", "_", stem or suffix).strip(". ")[:80] or "data"
    ending = re.sub(r"\W", "", suffix)[:12] if stem and dot else ""
    return f"{clean}.{ending}" if ending else clean
