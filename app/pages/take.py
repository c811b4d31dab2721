"""Take it with you: a run's curve as CSV and for TensorBoard, and base and adapter merged into one plain model."""

from __future__ import annotations

import shutil
import tempfile
import threading
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from app.pages import owners, train
from app.pages.lab import Lab, title
from app.pages.values import check
from app.runs.run import Run
from app.runs.tensorboard import event_file
from app.tables import as_csv
from lora_core.errors import UserError
from lora_core.home import writing

FOLDER = "take"  # below LoRA Lab's home; the last merged model is kept there
_merging = threading.Lock()


def routes(lab: Lab) -> list[Route]:
    """The files, below lab/api/take."""
    return [Route(f"/lab/api/take/{name}", giving(lab, f), methods=["GET"]) for name, f in FILES.items()]


def giving(lab: Lab, file: Callable[[Lab, Run], Response]) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        try:
            check("GET", "take", request.query_params)
            return await run_in_threadpool(lambda: file(lab, owners.taken(lab.run(request.query_params.get("run")))))
        except UserError as error:
            return JSONResponse({"error": str(error), "field": ""}, 404)

    return endpoint


def called(run: Run) -> str:
    """The run in a file's name."""
    return "recorded-run" if run.recorded else f"run-{run.id}"


def attached(data: bytes, name: str, kind: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store"}
    return Response(data, media_type=kind, headers=headers)


def curve(lab: Lab, run: Run) -> Response:
    """The curve as CSV, one row for each event."""
    return attached(as_csv(train.table(lab.store.events(run.id))).encode(), f"{called(run)}.csv", "text/csv")


def tensorboard(lab: Lab, run: Run) -> Response:
    """The curve as an event file; TensorBoard knows it by its name."""
    began = run.started or run.created
    name = f"events.out.tfevents.{int(began)}.{called(run)}"
    return attached(event_file(lab.store.events(run.id), began), name, "application/octet-stream")


def place(lab: Lab, run: Run) -> Path:
    return lab.store.root.parent / FOLDER / f"{called(run)}-merged.zip"


def merged(lab: Lab, run: Run) -> Response:
    """The merged model that `merge` made."""
    path = place(lab, run)
    if not path.exists():
        raise UserError(f"{title(run)} is not merged yet, or its file made room for another; merge it again")
    return FileResponse(path, filename=path.name, media_type="application/zip")


FILES = {"curve.csv": curve, "tensorboard": tensorboard, "merged.zip": merged}


def merge(lab: Lab, body: Mapping[str, Any]) -> dict[str, Any]:
    """Write base plus adapter as one transformers folder, zipped, in float32: {"file", "bytes"}. Takes seconds.

    The last one is kept, so that a second download costs nothing; another run's makes room.
    """
    run = owners.taken(lab.run(body.get("run")))
    if run.adapter is None:
        raise UserError(f"{title(run)} has no adapter to merge")
    path, newest = place(lab, run), max(p.stat().st_mtime for p in run.adapter.iterdir())
    if not path.exists() or path.stat().st_mtime < newest:
        if not _merging.acquire(blocking=False):
            raise UserError("a model is being merged already; wait until it is done")
        try:
            make(run, path)
        finally:
            _merging.release()
    return {"file": f"take/merged.zip?run={run.id}", "bytes": path.stat().st_size}


def make(run: Run, path: Path) -> None:
    from app.commands import adapters

    assert run.adapter is not None
    with writing(path.parent):
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir(mode=0o700, parents=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        folder = Path(temporary) / path.stem
        adapters.merge(str(run.adapter), folder, model=run.request.model, dtype="float32", json=False)
        part = path.with_suffix(".part")
        with writing(path.parent):
            with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as z:
                for file in sorted(p for p in folder.rglob("*") if p.is_file()):
                    z.write(file, f"{path.stem}/{file.relative_to(folder)}")
            part.replace(path)
