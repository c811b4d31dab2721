"""What Spectra looks at: the adapter of a run, or one that was opened; with what is known of it without its model."""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.pages import owners
from app.pages.lab import Lab, title
from app.runs.run import Run
from lora_core.errors import UserError

if TYPE_CHECKING:
    from lora_core.audit import Audit
    from lora_core.base_files import BaseFiles
    from lora_core.difference import Whole
    from lora_core.spectra import Spectrum
    from lora_core.stored import Stored, StoredSite

KEPT = 8  # adapters whose factors and spectra are kept in memory
DENSE = 16  # directions of a checkpoint's difference that are looked at beside W0
SEED = 0  # of the random update
Place = tuple[int, str]
_kept: OrderedDict[tuple[Any, ...], Looked] = OrderedDict()
_opened: OrderedDict[str, Source] = OrderedDict()
_bases: OrderedDict[str, BaseFiles] = OrderedDict()
_lock = threading.RLock()  # reading an adapter of DoRA's takes its base
logger = logging.getLogger("lora_lab.page")


class Looked:
    """An adapter that was read: its factors, its spectra, the word for each matrix, and where each is on the map."""

    dense = False

    def __init__(self, stored: Stored) -> None:
        from lora_core.spectra import spectra

        self.sites = stored.sites
        self.spectra: dict[str, Spectrum] = dict(spectra(stored))
        self.total = len(self.spectra)

    @property
    def ready(self) -> bool:
        return len(self.spectra) == self.total

    @cached_property
    def places(self) -> dict[str, Place]:
        """{matrix: (layer, name)}, no two alike; what is in no layer stands in the first column."""
        places = {k: (s.layer, s.target) for k, s in self.spectra.items()}
        count, seen, out = Counter(places.values()), Counter[Any](), {}
        for k, (layer, name) in places.items():
            where = (layer, name)
            seen[where] += 1
            own = f"{name}-{seen[where]}" if count[where] > 1 else name  # experts
            out[k] = (layer or 0, "".join(c if c.isalnum() or c in "-_" else "_" for c in own)[-40:])
        return out

    @cached_property
    def audit(self) -> Audit:
        from lora_core.audit import audit_spectra

        return audit_spectra(self.spectra, dense=self.dense)

    @cached_property
    def words(self) -> dict[str, str]:
        """{matrix: dead, collapsed, partly used or full}"""
        return {m.path: m.word for m in self.audit.matrices}

    def site(self, key: str, base: BaseFiles) -> StoredSite:
        """One matrix with its factors."""
        return self.sites[key]

    def base_sigma(self, key: str, base: BaseFiles) -> np.ndarray:
        """The singular values of W0."""
        return base.sigma(self.sites[key])

    def null(self, s: Spectrum) -> np.ndarray:
        """The singular values of a random update of the same shape, rank and norm."""
        from lora_core.spectra import same_norm_random

        return same_norm_random(s.shape[0], s.shape[1], s.rank, s.norm, seed=SEED)


class Dense(Looked):
    """ΔW of full rank, a whole checkpoint's difference to its base or DoRA's; spectra come one after the other."""

    dense = True
    note = ""

    def __init__(self, difference: Whole) -> None:
        self.difference = difference
        self.sites, self.spectra, self.total = {}, {}, len(difference)
        self.fault = ""
        threading.Thread(target=self._work, name="difference", daemon=True).start()

    def _work(self) -> None:
        try:
            found = {}
            for key, s in self.difference.spectra():
                found[key] = s
                self.spectra = dict(found)
        except UserError as error:
            self.fault = str(error)
        except Exception as error:
            logger.exception("difference")
            self.fault = f"that did not work ({type(error).__name__}); the server's log says more"

    def site(self, key: str, base: BaseFiles) -> StoredSite:
        """The first directions of one matrix as factors, as its module multiplies."""
        site, D = self._whole(key, base)
        U, sigma, Vt = np.linalg.svd(D, full_matrices=False)
        return replace(site, B=U[:, :DENSE] * sigma[:DENSE], A=Vt[:DENSE], scaling=1.0, m=None)

    def _whole(self, key: str, base: BaseFiles) -> tuple[StoredSite, np.ndarray]:
        """(the matrix without its factors, ΔW turned as its module multiplies)"""
        from lora_core.stored import StoredSite

        D = self.difference.delta(key)
        target, layer = self.difference.place(key)
        empty = np.zeros((0, 0))
        site = StoredSite(key=key, path=key, target=target, layer=layer, A=empty, B=empty, alpha=1.0, scaling=1.0)
        return site, D.T if base.turned(site) else D

    def base_sigma(self, key: str, base: BaseFiles) -> np.ndarray:
        """The singular values of W0."""
        from lora_core.difference import Difference, singular_values

        assert isinstance(self.difference, Difference)
        return singular_values(self.difference.base.read(self.difference.pairs[key][1]).astype(np.float64))

    def null(self, s: Spectrum) -> np.ndarray:
        """The singular values of one Gaussian matrix of the same norm."""
        from lora_core.difference import same_norm_noise

        return same_norm_noise(*s.shape, s.norm)


class Dora(Dense):
    """A DoRA adapter's W' − W0, which takes the base model's files."""

    note = "DoRA turns W0's own rows: its ΔW = W′ − W0 has full rank."

    def __init__(self, stored: Stored, base: BaseFiles) -> None:
        from lora_core.difference import DoraDifference

        self.stored = stored
        super().__init__(DoraDifference(stored, base))

    def _whole(self, key: str, base: BaseFiles) -> tuple[StoredSite, np.ndarray]:
        return self.stored.sites[key], self.difference.delta(key)

    def base_sigma(self, key: str, base: BaseFiles) -> np.ndarray:
        """The singular values of W0."""
        return base.sigma(self.stored.sites[key])


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a page's pictures come from.

    key   as the page asks for it: {"run": 14} or {"open": "1f3a…"}
    name  in a sentence; base: the base model's name, if it is known; seed: of a run; file: what a file says of itself
    """

    key: dict[str, Any]
    stamp: str
    name: str
    looked: Looked
    base: str | None
    seed: Any = None
    recorded: bool = False
    file: dict[str, Any] | None = None


def source(lab: Lab, query: Mapping[str, Any]) -> Source:
    """The source that a request names. UserError when it is not there (any more), or has no adapter yet."""
    if query.get("open"):
        return of_opened(lab, str(query["open"]))
    run = lab.run(query.get("run"))
    key, looked = of_run(run)
    return Source(key={"run": run.id}, stamp=":".join(map(str, (*key, run.request.model))), name=title(run),
                  looked=looked, base=run.request.model, seed=run.request.config.get("seed"),
                  recorded=run.recorded)  # fmt: skip


def named(text: str) -> dict[str, str]:
    """The query of a source out of one word: "14" is a run, anything else was opened."""
    return {"run": text} if text.isdigit() and len(text) < 16 else {"open": text}


def of_run(run: Run) -> tuple[tuple[str, int], Looked]:
    """(what tells one state of the files from another, the adapter of a run); UserError when it has none yet."""
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

    def make() -> Looked:
        stored = read_adapter(folder)
        return Dora(stored, base_files(run.request.model)) if stored.dora else Looked(stored)

    return key, remembered(key, make)


def of_opened(lab: Lab, set_id: str) -> Source:
    with _lock:
        if set_id in _opened and lab.sets.has(set_id):
            _opened.move_to_end(set_id)
            return _opened[set_id]
    found, name = lab.sets.open(set_id)

    def make() -> Looked:
        if found.difference is not None:
            return Dense(found.difference)
        assert found.stored is not None
        return Looked(found.stored)

    told = {"kind": found.kind, "metadata": found.metadata, "remarks": list(found.remarks), "base": found.base}
    made = Source(key={"open": set_id}, stamp=f"opened:{set_id}:{found.base}", name=name, file=told,
                  base=owners.may_name(found.base), looked=make())  # fmt: skip
    with _lock:
        _opened[set_id] = made
        while len(_opened) > KEPT // 2:
            _opened.popitem(last=False)
    return made


def forget(set_id: str) -> None:
    """What was opened is read anew when it is asked for next."""
    with _lock:
        _opened.pop(set_id, None)


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
        raise UserError(f"the base model {name} is not on this machine" if name else
                        "the file does not say which base model it belongs to")  # fmt: skip
    with _lock:
        if str(folder) not in _bases:
            _bases[str(folder)] = BaseFiles(folder)
            while len(_bases) > 2:
                _bases.popitem(last=False)
        return _bases[str(folder)]
