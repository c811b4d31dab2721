"""Amplification and overlap of every matrix, for the map: measured in the background, and kept on the disk.

A measurement is a matter of seconds (one set of singular values of W0 a matrix), starts when somebody looks at the
map, and ends when the same person looks at another adapter's.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from app import figures
from app.pages import owners, words_spectra
from app.pages.lab import Lab
from app.pages.sources import Source, base_files, source
from app.pages.spectra import address, mapped
from lora_core.errors import UserError
from lora_core.home import home, read_json, write_json

MEASURES = {"amplification": "amplification", "overlap": "overlap with W0"}
MOST_FILES, KEPT = 200, 64  # measurements on the disk, and in memory
PAUSE_S = 0.02  # between two matrices: a click is answered in between
logger = logging.getLogger("lora_lab.page")


class Job:
    """One adapter's measurement: what is found by now."""

    def __init__(self, stamp: str, total: int, owner: str) -> None:
        self.stamp, self.total, self.owner = stamp, total, owner
        self.found: dict[str, dict[str, float]] = {}
        self.fault = ""
        self.stopped = False


_jobs: dict[str, Job] = {}
_lock = threading.Lock()
_turn = threading.Lock()  # one matrix at a time, whoever asks


def besides(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """The map's measures beside W0: whole, or how far they are; {"away"} with a sentence where there is no W0 here."""
    s = source(lab, query)
    try:
        job = ensure(s)
    except UserError as error:
        return s.key | {"away": str(error)}
    answer: dict[str, Any] = s.key | {"done": len(job.found), "of": job.total}
    if job.fault:
        return answer | {"away": job.fault}
    if len(job.found) < job.total:
        return answer
    measures = {}
    for name, text in MEASURES.items():
        values = mapped(s.looked, {k: b[name] for k, b in job.found.items()})
        told = words_spectra.along(name, {address(s.looked, k): b for k, b in job.found.items()})
        measures[name] = {"title": text, "values": values, "say": told,
                          "figure": figures.heatmap(values, text, norm=False)}  # fmt: skip
    return answer | {"measures": measures}


def ensure(s: Source) -> Job:
    """The measurement of a source: the one that is known, one from the disk, or one that begins now."""
    with _lock:
        job = _jobs.get(s.stamp)
        if job is None or job.stopped:
            for other in _jobs.values():  # one map a person: nobody ends another one's
                other.stopped = other.stopped or other.owner == owners.owner() and len(other.found) < other.total
            base = base_files(s.base)
            job = _jobs[s.stamp] = Job(s.stamp, s.looked.total, owners.owner())
            kept = read_json(file_of(s.stamp))
            if isinstance(kept, dict) and kept.keys() == s.looked.spectra.keys():
                job.found = kept
            else:
                threading.Thread(target=work, args=(job, s, base), name="besides", daemon=True).start()
            for old in [k for k, j in _jobs.items() if j is not job][:-KEPT]:
                del _jobs[old]
        return job


def work(job: Job, s: Source, base: Any) -> None:
    """Measure every matrix; the answer is written down when all are there."""
    from lora_core.beside import beside, svd

    found: dict[str, dict[str, float]] = {}
    try:
        for key in s.looked.spectra:
            if job.stopped:
                return
            with _turn:
                site = s.looked.site(key, base)
                W0 = base.W0(site)
                b = beside(*svd(site.B, site.A, site.scaling), W0, base.sigma(site, W0))
            found[key] = {"amplification": b.amplification, "overlap": b.overlap, "random": b.random / (b.top or 1.0)}
            job.found = dict(found)
            time.sleep(PAUSE_S)
        with suppress(OSError, UserError):
            file = file_of(s.stamp)
            file.parent.mkdir(exist_ok=True)
            write_json(file, found)
            for old in sorted(file.parent.glob("*.json"), key=lambda p: p.stat().st_mtime)[:-MOST_FILES]:
                old.unlink()
    except UserError as error:
        job.fault = str(error)
    except Exception as error:
        logger.exception("beside W0")
        job.fault = f"that did not work ({type(error).__name__}); the server's log says more"


def file_of(stamp: str) -> Path:
    return home() / "beside" / f"{hashlib.sha256(stamp.encode()).hexdigest()[:24]}.json"
