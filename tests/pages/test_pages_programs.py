"""The page's endpoints for programs, called by gradio_client over a real server."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from gradio_client import Client
from gradio_client.exceptions import AppError

from app.pages.keys import Keys
from app.runs.queue import RunQueue
from app.runs.run import Run
from app.runs.store import RunStore
from app.server import create_app, listen
from scripts.train_by_program import connected, trained
from tests.pages_kit import STAND_IN

NAMES = {"/models", "/tasks", "/budget", "/start", "/run", "/losses", "/stop"}
KEYS = Keys(presenter="p" * 22, participant="q" * 22)


class Served:
    """The app in a thread of its own, on a port of its own."""

    def __init__(self, store: RunStore, keys: Keys | None) -> None:
        self.listening: socket.socket = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        app = create_app(store, RunQueue(store, command=STAND_IN), model=None, keys=keys)
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listening]}, daemon=True)

    def __enter__(self) -> Served:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.listening.close()


@pytest.fixture(scope="module")
def room(store: RunStore, run: Run) -> Iterator[str]:
    with Served(store, KEYS) as served:
        yield served.url


@pytest.fixture(scope="module")
def presenter(room: str) -> Iterator[Client]:
    client = connected(f"{room}/?key={KEYS.presenter}")
    yield client
    client.close()


def test_only_the_named_endpoints_are_shown(presenter: Client) -> None:
    shown: Any = presenter.view_api(return_format="dict", print_info=False)
    assert set(shown["named_endpoints"]) == NAMES and not shown["unnamed_endpoints"]


def test_a_program_counts_trains_and_reads_the_losses(presenter: Client, model: str) -> None:
    assert {"name", "parameters", "cached", "about"} == set(presenter.predict(api_name="/models")[0])
    assert "sentiment" in [t["name"] for t in presenter.predict(api_name="/tasks")]
    spec = {"targets": ["q", "v"], "rank": 2}
    assert presenter.predict(model, spec, {}, api_name="/budget")["trainable"] == 2 * 2 * (32 + 32 + 32 + 16)
    done = trained(presenter, model, "sentiment", spec, {"steps": 6, "batch_size": 2})
    assert done["status"] == "done" and done["step"] == done["steps"] == 6 and done["loss"] < done["base_loss"]
    head, *rows = presenter.predict(done["run"], api_name="/losses")
    assert head[:2] == ["step", "training loss"] and [r[0] for r in rows if r[1] is not None] == [1, 2, 3, 4, 5, 6]


def test_what_is_wrong_is_told_in_the_page_s_words(presenter: Client, model: str, run: Run) -> None:
    with pytest.raises(AppError, match="rank is 0"):
        presenter.predict(model, "sentiment", {"rank": 0}, {}, api_name="/start")
    with pytest.raises(AppError, match="did you mean 'sentiment'"):
        presenter.predict(model, "sentimental", {}, {}, api_name="/start")
    with pytest.raises(AppError, match="no run"):
        presenter.predict(10**9, api_name="/run")
    for number in (None, [], {"a": 1}, "x", 1.5):
        with pytest.raises(AppError):
            presenter.predict(number, api_name="/stop")


def test_a_participant_s_program_has_a_participant_s_rights(room: str, presenter: Client, model: str, run: Run) -> None:
    client = connected(f"{room}/?key={KEYS.participant}")
    try:
        with pytest.raises(AppError, match="no run"):
            client.predict(run.id, api_name="/run")
        with pytest.raises(AppError, match="the presenter chooses the model"):
            client.predict("/nowhere", {}, {}, api_name="/budget")
        with pytest.raises(AppError, match="not yours|no run"):
            client.predict(run.id, api_name="/stop")
    finally:
        client.close()


def test_without_a_key_nothing_is_told(room: str) -> None:
    with pytest.raises(SystemExit, match="the whole link"):
        connected(f"{room}/?key=wrong")
    with pytest.raises(Exception, match="credentials were not provided"):
        connected(room)


def test_the_document_names_every_endpoint() -> None:
    text = (Path(__file__).parent.parent.parent / "docs" / "page_api.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in NAMES)
