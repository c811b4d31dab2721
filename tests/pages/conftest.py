"""The fixtures of the page's tests: one folder, one tiny model and one real run of it for each file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.pages.keys import Brake
from app.pages.lab import Lab
from app.pages.session import ModelSession
from app.pages.uploads import Uploads
from app.runs.experiments import ExperimentRunner
from app.runs.queue import RunQueue
from app.runs.run import Run
from app.runs.store import RunStore
from app.server import create_app
from tests.pages_kit import BASE, KEYS, STAND_IN, client, model_folder, trained


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """LoRA Lab's folder for this file; nothing is read from or left in the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("LORA_LAB_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def model(home: Path) -> str:
    return model_folder(home)


@pytest.fixture(scope="module")
def store(home: Path) -> RunStore:
    return RunStore(home, recorded=home / "nothing recorded")


@pytest.fixture(scope="module")
def run(store: RunStore, model: str) -> Run:
    done = trained(store, model)
    assert done.status == "done", done.error
    return done


@pytest.fixture(scope="module")
def lab(store: RunStore) -> Lab:
    queue = RunQueue(store, command=STAND_IN)
    return Lab(store=store, queue=queue, session=ModelSession(), uploads=Uploads(store.root.parent),
               experiments=ExperimentRunner(store.root.parent))  # fmt: skip


@pytest.fixture(scope="module")
def page(store: RunStore, run: Run) -> Iterator[TestClient]:
    with client(store) as found:
        yield found


# ---- a server for others, which asks for a key
@pytest.fixture(scope="module")
def app(home: Path) -> Iterator[Any]:
    store = RunStore(home)
    found = create_app(store, RunQueue(store, command=STAND_IN), model=None, keys=KEYS)
    with TestClient(found, base_url=BASE):
        yield found


@pytest.fixture
def outside(app: Any) -> TestClient:
    app.brake = Brake()
    return TestClient(app, base_url=BASE)


@pytest.fixture
def inside(app: Any) -> TestClient:
    app.brake = Brake()
    found = TestClient(app, base_url=BASE)
    assert found.get(f"/?key={KEYS.host}").status_code == 200
    return found
