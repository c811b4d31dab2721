"""Runs as one file, to be kept or given to somebody: `export_runs` writes a zip, `import_runs` reads one strictly.

    manifest.json           {"format": 1, "runs": ["run-14"], "files": {name: {"bytes", "sha256"}}}
    run-14/run.json         how the run ended and what was asked for (`Told`)
    run-14/events.jsonl     its curve and its film
    run-14/adapter/…        adapter_config.json, adapter_model.safetensors, lora_lab.json
    run-14/data.tsv, test.tsv   the user's rows, where it was trained on a file

An archive is data from anybody: only these names are taken, as plain files, as many and as large as they may be, with
the hashes that the manifest says; weights come as safetensors alone. A run is entered whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from app.runs import events as event_files
from app.runs.folder import ADAPTER
from app.runs.run import ENDED, Run
from app.runs.store import RunStore
from app.runs.told import Told, read_events, strict_json, told_of
from lora_core.errors import UserError
from lora_core.foreign import BROKEN_ZIP
from lora_core.home import sync_folder, write_json, writing
from lora_core.tasks.data_files import EXTENSIONS
from lora_core.tasks.data_files import MOST_BYTES as MOST_ROWS

FORMAT = 1
MANIFEST, RUN = "manifest.json", "run.json"
WEIGHTS = "adapter_model.safetensors"
ADAPTER_FILES = ("adapter_config.json", WEIGHTS, "lora_lab.json")
MOST_RUNS, MOST_JSON, MOST_EVENTS, MOST_WEIGHTS, MOST_TOTAL = 1000, 4 << 20, 256 << 20, 2 << 30, 8 << 30
FOLDER = re.compile(r"run-[1-9][0-9]{0,14}", re.ASCII)
DATA = re.compile(rf"(data|test)({'|'.join(re.escape(e) for e in EXTENSIONS)})", re.ASCII)
BLOCK = 1 << 20


def export_runs(store: RunStore, ids: Sequence[int], out: Path) -> dict[str, Any]:
    """Write runs that have ended to one zip: {"file", "bytes", "runs"}. The file is there whole or not at all.

    Raises UserError for a run that is not over, or has no folder any more, and where `out` cannot be written.
    """
    runs = [store.get(i) for i in dict.fromkeys(ids)]
    if not runs:
        raise UserError("no run named; give the numbers of runs, such as 14")
    for run in runs:
        if run.recorded:
            raise UserError("the recorded run comes with LoRA Lab; it needs no export")
        if run.status not in ENDED:
            raise UserError(f"run {run.id} is {run.status}; only runs that are over can be exported")
        if not run.folder.is_dir():
            raise UserError(f"the folder of run {run.id} is gone: there is nothing to export")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    files: dict[str, dict[str, Any]] = {}
    try:
        with writing(out.parent):
            out.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as target:
                with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as z:
                    for run in runs:
                        _put_run(z, run, files)
                    manifest = {"format": FORMAT, "runs": [f"run-{r.id}" for r in runs], "files": files}
                    z.writestr(MANIFEST, json.dumps(manifest, indent=1))
                target.flush()
                os.fsync(target.fileno())
            os.replace(part, out)
            sync_folder(out.parent)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return {"file": str(out), "bytes": out.stat().st_size, "runs": [r.id for r in runs]}


def _put_run(z: zipfile.ZipFile, run: Run, files: dict[str, dict[str, Any]]) -> None:
    name = f"run-{run.id}"
    text = json.dumps(event_files.plain(told_of(run).model_dump()), indent=1).encode()
    z.writestr(f"{name}/{RUN}", text)
    files[f"{name}/{RUN}"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    found = [p for p in sorted(run.folder.iterdir()) if p.name == event_files.NAME or DATA.fullmatch(p.name)]
    if run.adapter is not None and run.adapter.is_dir():
        found += [run.adapter / n for n in ADAPTER_FILES if (run.adapter / n).is_file()]
    for path in found:
        inside = f"{name}/{path.relative_to(run.folder)}"
        seen, size = hashlib.sha256(), 0
        kind = zipfile.ZIP_STORED if path.name == WEIGHTS else zipfile.ZIP_DEFLATED
        entry = zipfile.ZipInfo(inside)
        entry.compress_type, entry.external_attr = kind, 0o600 << 16
        with open(path, "rb") as source, z.open(entry, "w", force_zip64=True) as target:
            while block := source.read(BLOCK):
                seen.update(block)
                size += len(block)
                target.write(block)
        files[inside] = {"bytes": size, "sha256": seen.hexdigest()}


# ---- reading -----------------------------------------------------------------------------------------------------
def import_runs(store: RunStore, path: Path) -> list[Run]:
    """Enter the runs of an archive with new numbers, as they ended; gives them in the archive's order.

    Nothing is entered before all of the archive has been read and found good. Raises UserError that says what is wrong.
    """
    folders: list[Path] = []
    found: list[Told] = []
    try:
        with _opened(path) as z:
            manifest, entries = _manifest(z, path)
            for name in manifest["runs"]:
                folders.append(store.root / f".new-{secrets.token_hex(8)}")
                with writing(store.root):
                    folders[-1].mkdir(mode=0o700, parents=True)
                    found.append(_unpack(z, name, manifest["files"], entries, folders[-1]))
        return [store.adopt(new, told.request_of(), told.values(new / ADAPTER)) for new, told in zip(folders, found)]
    finally:
        for new in folders:
            shutil.rmtree(new, ignore_errors=True)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip, with what zipfile says of broken ones as UserErrors."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as z:
            yield z
    except UserError:
        raise
    except BROKEN_ZIP as error:
        raise UserError(f"{path.name} is no readable archive of runs: {error}") from None
    except OSError as error:
        if error.filename == str(path):
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        raise


def _manifest(z: zipfile.ZipFile, path: Path) -> tuple[Mapping[str, Any], dict[str, zipfile.ZipInfo]]:
    """(the manifest, {name: entry}): entry for entry of the archive a file that may be there, and none missing."""

    def wrong(what: str) -> UserError:
        return UserError(f"{path.name} is no archive of runs: {what}")

    infos = z.infolist()
    if len(infos) > MOST_RUNS * 8:
        raise wrong(f"it has {len(infos):,} files")
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        kind = stat.S_IFMT(info.external_attr >> 16)
        if info.orig_filename != info.filename or limit_of(info.filename) is None:
            raise wrong(f"a file named {info.orig_filename[:80]!r} is none of its kinds")
        if kind not in (0, stat.S_IFREG) or info.is_dir():
            raise wrong(f"{info.filename} is a link or a folder")
        if info.filename in entries:
            raise wrong(f"{info.filename} is there twice")
        entries[info.filename] = info
    if MANIFEST not in entries:
        raise wrong(f"it has no {MANIFEST}")
    manifest = strict_json(_bytes(z, entries.pop(MANIFEST), MOST_JSON), path.name)
    files, runs = manifest.get("files"), manifest.get("runs")
    if manifest.get("format") != FORMAT or not isinstance(files, dict) or not isinstance(runs, list):
        raise wrong(f"its format is {str(manifest.get('format'))[:20]}; format {FORMAT} is read")
    if set(files) != set(entries):
        raise wrong(f"its manifest does not fit its files ({sorted(set(files) ^ set(entries))[0][:80]!r})")
    folders = {n.split("/")[0] for n in entries}
    if not runs or len(runs) > MOST_RUNS or not all(isinstance(r, str) for r in runs) or folders != set(runs):
        raise wrong("its manifest does not name its runs")
    sizes: list[Any] = [f.get("bytes") if isinstance(f, dict) else None for f in files.values()]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in sizes):
        raise wrong("its files have sizes that are none")
    if sum(sizes) > MOST_TOTAL:
        raise wrong(f"its files are more than {MOST_TOTAL >> 30} GiB together")
    if len(set(runs)) != len(runs):
        raise wrong("it names a run twice")
    return manifest, entries


def limit_of(name: str) -> int | None:
    """How many bytes a file of that name may have; None for a name that no archive of runs has."""
    if name == MANIFEST:
        return MOST_JSON
    folder, _, rest = name.partition("/")
    if not FOLDER.fullmatch(folder):
        return None
    fixed = {RUN: MOST_JSON, event_files.NAME: MOST_EVENTS}
    fixed |= {f"{ADAPTER}/{n}": MOST_WEIGHTS if n == WEIGHTS else MOST_JSON for n in ADAPTER_FILES}
    return MOST_ROWS if DATA.fullmatch(rest) else fixed.get(rest)


def _unpack(z: zipfile.ZipFile, name: str, files: Mapping[str, Any], entries: Mapping[str, zipfile.ZipInfo],
            to: Path) -> Told:  # fmt: skip
    """Write one run's files into a folder of ours, each as long and with the hash that the manifest says."""
    mine = {n.removeprefix(f"{name}/"): info for n, info in entries.items() if n.startswith(f"{name}/")}
    if RUN not in mine:
        raise UserError(f"{name} has no {RUN}")
    told = Told.read(_checked(z, mine.pop(RUN), files[f"{name}/{RUN}"]), name)
    if any(n.startswith(f"{ADAPTER}/") for n in mine):
        (to / ADAPTER).mkdir()
    for inside, info in mine.items():
        with open(to / inside, "xb") as target:
            _checked(z, info, files[f"{name}/{inside}"], target)
            target.flush()
            os.fsync(target.fileno())
    told.check_files(to, name)
    read_events(to / event_files.NAME, name)
    if (to / ADAPTER).is_dir():
        from lora_core.files import read_adapter

        try:
            read_adapter(to / ADAPTER)
        except UserError as error:
            raise UserError(f"the adapter of {name}: {str(error).replace(str(to), name)}") from None
        sync_folder(to / ADAPTER)
    write_json(to / "request.json", told.request_of().to_dict())
    return told


def _bytes(z: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> bytes:
    with z.open(info) as source:
        data = source.read(most + 1)
    if len(data) > most:
        raise UserError(f"{info.filename} is larger than {most >> 20} MiB")
    return data


def _checked(z: zipfile.ZipFile, info: zipfile.ZipInfo, wanted: Mapping[str, Any], to: IO[bytes] | None = None
             ) -> bytes:  # fmt: skip
    """The bytes of a file (written to `to` where that is given), counted and hashed while they come."""
    most, seen, size, kept = limit_of(info.filename) or 0, hashlib.sha256(), 0, []
    if wanted["bytes"] > most or info.file_size != wanted["bytes"]:
        raise UserError(f"{info.filename} has {info.file_size:,} bytes; its manifest says {wanted['bytes']:,}, and at "
                        f"most {most:,} are taken")  # fmt: skip
    with z.open(info) as source:
        while block := source.read(BLOCK):
            size += len(block)
            if size > wanted["bytes"]:
                raise UserError(f"{info.filename} is longer than it says")
            seen.update(block)
            to.write(block) if to is not None else kept.append(block)
    if size != wanted["bytes"] or seen.hexdigest() != wanted.get("sha256"):
        raise UserError(f"{info.filename} is not what it was when it was exported: its SHA-256 is another")
    return b"".join(kept)
