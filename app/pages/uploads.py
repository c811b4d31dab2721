"""The user's own files: taken in by a route of ours, bounded in size, number and name, kept in a folder of ours.

An upload is known by a random id. A run copies its file into its own folder, so uploads are swept after a day.
"""

from __future__ import annotations

import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

from lora_core.errors import UserError, unknown
from lora_core.home import writing

MOST_FILES = 50
MOST_TOTAL = 512 << 20  # bytes of all uploads together
OLD_S = 86_400.0
ID = re.compile(r"[0-9a-f]{16}")


class Uploads:
    """The folder `uploads` below LoRA Lab's home: one folder an upload, with one file in it."""

    def __init__(self, home: Path) -> None:
        self.root = home / "uploads"

    async def take(self, name: str, chunks: AsyncIterator[bytes]) -> tuple[str, str]:
        """(id, name) of a new upload. Raises UserError for a wrong ending, too much, too many, or a full disk."""
        from lora_core.tasks.data_files import EXTENSIONS, MOST_BYTES

        clean = safe_name(name)
        if Path(clean).suffix.lower() not in EXTENSIONS:
            raise unknown("reader for files that end in", Path(clean).suffix or clean, EXTENSIONS)
        self.sweep()
        kept = self._kept()
        if len(kept) >= MOST_FILES:
            raise UserError(f"{len(kept)} files are here already; at most {MOST_FILES} are kept for a day")
        room = MOST_TOTAL - sum(p.stat().st_size for p in kept)
        id = secrets.token_hex(8)
        folder = self.root / id
        try:
            with writing(self.root):
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
                folder.mkdir(mode=0o700)
                count = 0
                with open(folder / clean, "wb") as file:
                    async for chunk in chunks:
                        count += len(chunk)
                        if count > MOST_BYTES:
                            raise UserError(f"{clean} is larger than {MOST_BYTES >> 20} MB; give a smaller file")
                        if count > room:
                            raise UserError(f"the files of one day may have {MOST_TOTAL >> 20} MB together; they do")
                        file.write(chunk)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return id, clean

    def adopt(self, path: Path, name: str) -> tuple[str, str]:
        """(id, name) of a copy of a run's file, so that the form can be filled with that run again."""
        clean = safe_name(name)
        id = secrets.token_hex(8)
        with writing(self.root):
            (self.root / id).mkdir(mode=0o700, parents=True)
            shutil.copyfile(path, self.root / id / clean)
        return id, clean

    def path(self, id: str) -> Path:
        """The file of an upload; UserError when there is none of that id (any more)."""
        files = list((self.root / id).iterdir()) if ID.fullmatch(id) and (self.root / id).is_dir() else []
        if len(files) != 1:
            raise UserError("that file is no longer here; choose it again")
        return files[0]

    def sweep(self, older_s: float = OLD_S) -> None:
        """Remove what is older than a day."""
        with suppress(OSError):
            for folder in self.root.iterdir():
                if time.time() - folder.stat().st_mtime > older_s:
                    shutil.rmtree(folder, ignore_errors=True)

    def _kept(self) -> list[Path]:
        return [p for p in self.root.glob("*/*") if p.is_file()]


def safe_name(name: str) -> str:
    """A file's own name: no folder, plain letters, not long. "a/b/My data?.txt" becomes "My data_.txt"."""
    last = re.split(r"[\\/]", name)[-1].strip()
    stem, dot, suffix = last.rpartition(".")
    clean = re.sub(r"[^\w .()+-]", "_", stem or suffix).strip(". ")[:80] or "data"
    ending = re.sub(r"\W", "", suffix)[:12] if stem and dot else ""
    return f"{clean}.{ending}" if ending else clean
