"""Rows of the run store: which columns a run is made of, and which runs a list is asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.runs.folder import ADAPTER
from app.runs.run import ENDED, Run, RunRequest, Status
from lora_core.errors import UserError, unknown

NAMES = (
    *("id", "status", "request", "created", "started", "ended", "attempts", "step", "steps", "base_loss", "loss"),
    *("score", "result", "error", "adapter", "pid", "process", "owner", "shared", "position"),
)
POSITION = """CASE WHEN status = 'queued' AND queued IS NOT NULL THEN (SELECT count(*) FROM runs q
    WHERE q.status = 'queued' AND (q.queued, q.id) <= (runs.queued, runs.id)) END"""
COLUMNS = ", ".join(NAMES[:-1]) + f", {POSITION}"
WORDS = "words || ' ' || status || ' run ' || id"  # what a search looks through; migration 3 says what `words` are
# the same for whoever may not know what somebody else's file is called
OTHERS = f"CASE WHEN owner = ? OR request ->> '$.data' IS NULL THEN words ELSE model END || {WORDS[len('words || '):]}"
MOST_LISTED, LONGEST_SEARCH = 10_000, 200


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which runs are asked for; UserError for what cannot be.

    status  only runs in one of these; model: only runs of this one, by its name
    text    only runs in whose title, model, data, settings, status or number every word of it stands; A and a are one
    owner   only that person's runs; with `shared` also those that everybody may read (None: all runs), of which a
            search does not look at the title and the file's name where somebody trained on a file
    """

    status: Sequence[Status] = ()
    model: str | None = None
    text: str = ""
    owner: str | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        for name in self.status:
            if name not in (known := ("queued", "running", *ENDED)):
                raise unknown("status", str(name), known)
        if len(self.text) > LONGEST_SEARCH:
            raise UserError(f"the search has {len(self.text):,} characters; at most {LONGEST_SEARCH} are looked for")

    def where(self) -> tuple[str, list[Any]]:
        """(SQL after FROM runs, its values)."""
        only, values = [], []
        if self.status:
            only.append(f"status IN ({','.join('?' * len(self.status))})")
            values += self.status
        if self.owner is not None:
            only.append("(owner = ? OR shared)" if self.shared else "owner = ?")
            values.append(self.owner)
        if self.model is not None:
            only.append("model = ?")
            values.append(self.model)
        for word in plain_text(self.text).split():
            others = self.owner is not None and self.shared
            only.append(rf"{OTHERS if others else WORDS} LIKE ? ESCAPE '\'")
            values += [self.owner] if others else []
            values.append("%" + "".join(f"\\{c}" if c in "\\%_" else c for c in word) + "%")
        return f"WHERE {' AND '.join(only)}" if only else "", values


def plain_text(text: str) -> str:
    """Text that SQLite takes: without NUL and lone surrogates."""
    return text.replace("\0", " ").encode("utf-8", "replace").decode("utf-8")


def page(limit: int, offset: int) -> tuple[int, int]:
    """`limit` and `offset` of a list, checked."""
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MOST_LISTED:
        raise UserError(f"limit is {limit}; it must be from 1 to {MOST_LISTED:,}")
    if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset < 2**53:
        raise UserError(f"offset is {offset}; it must be 0 or more")
    return limit, offset


def run_of(row: Sequence[Any], root: Path) -> Run:
    """The run of a row; root: the store's folder."""
    d = dict(zip(NAMES, row, strict=True))
    folder = root / f"{d['id']:06d}"
    d["request"] = RunRequest.stored(json.loads(d["request"]))
    d["score"] = json.loads(d["score"]) if d["score"] else None
    d["result"] = json.loads(d["result"]) if d["result"] else {}
    d["adapter"] = folder / ADAPTER if d["adapter"] else None
    d["shared"] = bool(d["shared"])
    return Run(folder=folder, **d)
