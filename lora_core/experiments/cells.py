"""What an experiment has measured so far, on the disk: killed and started again, nothing is measured twice."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lora_core.home import sync_folder, writing


class Cells:
    """Finished cells as lines of JSON in one file, each on the disk before the next one begins.

    A line that a crash cut off is dropped when the file is opened.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        whole = 0
        for line in file.read_bytes().splitlines(keepends=True) if file.exists() else ():
            try:
                d = json.loads(line)
                self.values[d["key"]], self.seconds[d["key"]] = d["value"], d["seconds"]
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            whole += len(line)
        if file.exists() and file.stat().st_size > whole:
            with writing(file), open(file, "r+b") as f:
                f.truncate(whole)

    def put(self, key: str, value: Any, seconds: float) -> None:
        """Keep a cell. Values are plain JSON; they come back as JSON has them (a tuple as a list)."""
        line = json.dumps({"key": key, "value": value, "seconds": seconds})
        with writing(self.file):
            new = not self.file.exists()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "a", encoding="utf-8") as f:
                f.write(line + "\n")
                f.flush()
                os.fsync(f.fileno())
            if new:
                sync_folder(self.file.parent)
        self.values[key], self.seconds[key] = json.loads(line)["value"], seconds

    def drop(self) -> None:
        """Forget all: the experiment is finished."""
        self.file.unlink(missing_ok=True)
