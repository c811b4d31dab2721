"""What the tests of the page share: a tiny model, a store with one real run of it, and the app without a browser."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from app.pages.keys import Keys
from app.runs.queue import RunQueue
from app.runs.run import Run, RunRequest
from app.runs.store import RunStore
from tests.model_folder import tiny_llama

BASE = "http://127.0.0.1:7860"
KEYS = Keys(host="h" * 22, participant="t" * 22)
FILE = {"content-type": "application/octet-stream"}
STAND_IN = (sys.executable, "-m", "tests.runs_kit")  # a worker that trains nothing, and needs no torch
SMALL = {"steps": 6, "batch_size": 2, "eval_rows": 4, "seed": 0, "max_tokens": 64}


def model_folder(folder: Path) -> str:
    """A random Llama of two layers: q and o are (32, 32), k and v (16, 32)."""
    return str(tiny_llama(folder / "tiny"))


def trained(store: RunStore, model: str, **more: Any) -> Run:
    """A run of the tiny model, trained here and now."""
    from app.runs.worker import run_here

    config = {**SMALL, **more.pop("config", {})}
    spec = {"targets": ["q", "v"], "rank": 4, "alpha": 8.0, **more.pop("spec", {})}
    request = RunRequest(**{"model": model, "task": "sentiment", "spec": spec, "config": config, **more})
    return run_here(store, store.create(request).id)


@contextmanager
def client(store: RunStore, model: str | None = None, queue: RunQueue | None = None) -> Iterator[TestClient]:
    """The app as a browser meets it. `model` is what is loaded once the page answers."""
    from app.server import create_app

    app = create_app(store, queue or RunQueue(store, command=STAND_IN), model=model)
    with TestClient(app, base_url=BASE) as found:
        yield found


def ask(page: TestClient, what: str, /, **query: Any) -> dict[str, Any]:
    return page.get(f"/lab/api/{what}", params=query).json()


def say(page: TestClient, what: str, /, **body: Any) -> dict[str, Any]:
    return page.post(f"/lab/api/{what}", json=body).json()
