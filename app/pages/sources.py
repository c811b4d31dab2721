"""What Spectra looks at: the adapter of a run, or one that was opened; with what is known of it without its model."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.pages.lab import Lab, title
from app.runs.run import Run
from lora_core.errors import UserError

if TYPE_CHECKING:
    from lora_core.audit import Audit
    from lora_core.base_files import BaseFiles
    from lora_core.spectra import Spectra
    from lora_core.stored import Stored

KEPT = 8  # adapters whose factors and spectra are kept in memory
_kept: OrderedDict[tuple[Any, ...], Looked] = OrderedDict()
_bases: OrderedDict[str, BaseFiles] = OrderedDict()
_lock = threading.Lock()


class Looked:
    """An adapter that was read: its factors, its spectra, the word for each matrix."""

    def __init__(self, stored: Stored) -> None:
        from lora_core.spectra import spectra

        self.stored = stored
        self.spectra: Spectra = spectra(stored)

    @cached_property
    def audit(self) -> Audit:
        from lora_core.audit import audit

        return audit(self.stored)

    @cached_property
    def words(self) -> dict[str, str]:
        """{matrix: dead, collapsed, partly used or full}"""
        return {m.path: m.word for m in self.audit.matrices}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a page's pictures come from.

    key   as the page asks for it: {"run": 14}
    name  in a sentence; base: the base model's name, if it is known; seed: of a run
    """

    key: dict[str, Any]
    name: str
    looked: Looked
    base: str | None
    seed: Any = None
    recorded: bool = False

    @property
    def stamp(self) -> str:
        """The same for the same bytes."""
        folder = self.looked.stored.folder
        file = folder / "adapter_model.safetensors"
        return f"{folder}:{file.stat().st_mtime_ns if file.exists() else 0}:{self.base}"


def source(lab: Lab, query: Mapping[str, Any]) -> Source:
    """The source that a request names. UserError when it is not there (any more), or has no adapter yet."""
    run = lab.run(query.get("run"))
    return Source(key={"run": run.id}, name=title(run), looked=of_run(run), base=run.request.model,
                  seed=run.request.config.get("seed"), recorded=run.recorded)  # fmt: skip


def of_run(run: Run) -> Looked:
    """The adapter of a run; UserError when it has none yet."""
    from lora_core.files import read_adapter

    if run.adapter is None:
        why = "is still training; its spectra come when it has ended" if run.live else "ended without an adapter"
        raise UserError(f"{title(run)} {why}")
    file = run.adapter / "adapter_model.safetensors"
    try:
        key = (str(run.adapter), file.stat().st_mtime_ns)
    except OSError:
        raise UserError(f"the adapter of {title(run)} is no longer there") from None
    folder = run.adapter
    return remembered(key, lambda: Looked(read_adapter(folder)))


def remembered(key: tuple[Any, ...], make: Any) -> Looked:
    with _lock:
        if key not in _kept:
            _kept[key] = make()
            while len(_kept) > KEPT:
                _kept.popitem(last=False)
        _kept.move_to_end(key)
        return _kept[key]


def base_files(name: str | None) -> BaseFiles:
    """The files of a base model that is on this machine; UserError, with what can be done, where it is not."""
    from lora_core.base_files import BaseFiles, folder_here

    folder: Path | None = folder_here(name)
    if folder is None:
        raise UserError(f"the base model {name} is not on this machine; its spectra need nothing of it" if name else
                        "the file does not say which base model it belongs to")  # fmt: skip
    with _lock:
        if str(folder) not in _bases:
            _bases[str(folder)] = BaseFiles(folder)
            while len(_bases) > 2:
                _bases.popitem(last=False)
        return _bases[str(folder)]
