"""As code: the command, the lines of Python and the notebook make the very adapter that the page makes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from starlette.testclient import TestClient

from app.pages import adapt
from app.pages.lab import Lab
from app.runs.run import Run, RunRequest, command_line
from app.runs.store import RunStore
from lora_core.files import read_adapter
from tests.pages_kit import FILE, ask, say, trained

ROOT = Path(__file__).parent.parent.parent
# every setting that the page has, none as usual
SPEC = {"targets": ["v", "down"], "rank": 3, "alpha": 5.5, "layers": [1], "scaling": "alpha/sqrt(r)", "init": "kaiming",
        "dropout": 0.1}  # fmt: skip
CONFIG = {"steps": 4, "batch_size": 2, "lr": 0.0123456789, "seed": 7, "schedule": "cosine", "warmup": 0.25,
          "accumulate": 2, "max_tokens": 48, "eval_rows": 3, "eval_every": 2, "weight_decay": 0.01, "clip": 0.5,
          "dtype": "float32", "lr_ratio": 2.0}  # fmt: skip


@pytest.fixture(scope="module")
def made(store: RunStore, model: str) -> Run:
    run = trained(store, model, spec={**SPEC}, config=CONFIG)
    assert run.status == "done", run.error
    return run


@pytest.fixture(scope="module")
def form(lab: Lab, made: Run) -> dict[str, Any]:
    """What the dials show when that run is opened: all that the code is written from."""
    facts = lab.session.facts(made.request.model)
    found = adapt.form(lab, made, facts)
    return {"model": facts["name"], "spec": found["spec"], "config": found["config"], "data": found["data"]}


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {f"{k}.{n}": getattr(s, n) for k, s in read_adapter(folder).sites.items() for n in ("A", "B")}


def same(folder: Path, run: Run) -> None:
    assert run.adapter is not None
    mine, theirs = tensors(folder), tensors(run.adapter)
    assert mine.keys() == theirs.keys() and mine
    assert all(np.array_equal(mine[k], theirs[k]) for k in mine)


def environment(home: Path) -> dict[str, str]:
    import torch

    return {**os.environ, "LORA_LAB_HOME": str(home), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads())}  # fmt: skip


def test_the_command_makes_the_same_adapter(page: TestClient, form: dict[str, Any], made: Run, tmp_path: Path) -> None:
    program, *words = shlex.split(say(page, "code", **form)["command"])
    assert program == "lora-lab"
    subprocess.run([sys.executable, "-m", "app.cli", *words], cwd=tmp_path, env=environment(tmp_path), check=True,
                   capture_output=True, timeout=120)  # fmt: skip
    same(tmp_path / "my-adapter", made)


def test_the_lines_of_python_make_the_same_adapter(
    page: TestClient, form: dict[str, Any], made: Run, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(say(page, "code", **form)["python"])
    subprocess.run([sys.executable, "train.py"], cwd=tmp_path, env=environment(tmp_path), check=True, timeout=120,
                   capture_output=True)  # fmt: skip
    same(tmp_path / "my-adapter", made)


def test_the_notebook_makes_the_same_adapter(
    page: TestClient, form: dict[str, Any], made: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book: Any = nbformat.from_dict(say(page, "code", **form)["notebook"])
    nbformat.validate(book)
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    done = NotebookClient(book, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "down_proj" in str(done.cells[-1].outputs)
    same(tmp_path / "my-adapter", made)


@pytest.mark.slow
def test_a_file_of_ones_own_and_the_usual_settings(page: TestClient, model: str, tmp_path: Path) -> None:
    rows = "".join(f"colour {i}||a thing of colour {i}\n" for i in range(12))
    file = page.post("/lab/api/upload?name=my rows.txt", content=rows, headers=FILE).json()
    facts = ask(page, "model", name=model)
    config = {"steps": 2, "batch_size": 2, "eval_rows": 2, "max_tokens": 32}
    answer = say(page, "code", model=facts["name"], spec={}, config=config, data={"file": file["file"]})
    assert "my rows.txt" in answer["note"] and "--data 'my rows.txt'" in answer["command"]
    ranged = say(page, "code", model=facts["name"], spec={"layers": [1, 2, 3]}, config=config, data={"task": "pirate"})
    assert "layers=range(1, 4)" in ranged["python"]
    assert "rank_pattern" not in answer["python"] and "warmup" not in answer["python"]  # as usual: not written
    (tmp_path / "my rows.txt").write_text(rows)
    (tmp_path / "train.py").write_text(answer["python"])
    subprocess.run([sys.executable, "train.py"], cwd=tmp_path, env=environment(tmp_path), check=True, timeout=120,
                   capture_output=True)  # fmt: skip
    assert read_adapter(tmp_path / "my-adapter").sites


def test_what_cannot_be_trained_cannot_be_written_either(page: TestClient, form: dict[str, Any]) -> None:
    assert "rank" in say(page, "code", **{**form, "spec": {**form["spec"], "rank": 0}})["error"]
    assert "choose a task" in say(page, "code", **{**form, "data": {}})["error"]
    assert "rank_pattern" in say(page, "code", **{**form, "spec": {**form["spec"], "rank_pattern": {"v": 2}}})["error"]


def test_a_command_keeps_all_digits() -> None:
    request = RunRequest(model="m", task="pirate", spec={"alpha": 16.0}, config={"lr": 0.0012345678, "seed": 0})
    assert "--lr 0.0012345678" in command_line(request) and "--alpha 16 " in command_line(request)
