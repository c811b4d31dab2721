"""The notebooks: in git without outputs, each asks before it answers, and each runs from top to bottom."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
BOOKS = sorted(FOLDER.glob("*.ipynb"))
QUICK, HANGS_S, MOST_LINES, THIN = 3, 900, 20, 10


def test_all_of_them_are_there() -> None:
    assert [b.name[:2] for b in BOOKS] == [f"{i:02d}" for i in range(11)]


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_as_it_is_kept_in_git(book: Path) -> None:
    nb = nbformat.read(book, 4)
    nbformat.validate(nb)
    ids = [c["id"] for c in nb.cells]
    assert len(set(ids)) == len(ids) and all(i.startswith(book.name[:2]) for i in ids), "stable ids"
    assert nb.metadata.kernelspec.name == "python3"
    code = [c for c in nb.cells if c.cell_type == "code"]
    for c in code:
        assert not c.outputs and c.execution_count is None, f"{c['id']} has outputs: clear them before committing"
        assert len(c.source.splitlines()) <= MOST_LINES, f"{c['id']} is long: it belongs into the library"
    assert sum(len(c.source.splitlines()) > THIN for c in code) <= len(code) / 4, "thin code"
    assert nb.cells[0].cell_type == "markdown" and nb.cells[0].source.startswith(f"# {book.name[:2]} · ")
    assert "of the paper" in nb.cells[0].source, "which sections it is about"


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_it_asks_before_it_answers(book: Path) -> None:
    """Every answer has its question in a cell before, not in the same one, or nobody could guess."""
    nb = nbformat.read(book, 4)
    asked: set[str] = set()
    answers = 0
    for c in (c for c in nb.cells if c.cell_type == "code"):
        for name in asked:
            answers += f"{name}.reveal(" in c.source or f"{name}.answer(" in c.source
        for line in c.source.splitlines():
            name, _, what = line.partition(" = ")
            if what.startswith(("Guess(", "Question(")):
                assert f"{name}.reveal(" not in c.source and f"{name}.answer(" not in c.source, c["id"]
                assert c.source.splitlines()[-1] == name, f"{c['id']} does not show its question"
                asked.add(name)
    assert asked and answers >= len(asked), "a question is left without its answer"


@pytest.mark.timeout(HANGS_S)
@pytest.mark.parametrize(
    "book", [pytest.param(b, marks=() if i < QUICK else pytest.mark.slow) for i, b in enumerate(BOOKS)],
    ids=lambda b: b.stem,
)  # fmt: skip
def test_it_runs(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, in the folder where it lies. They take one to two minutes each; only what hangs takes HANGS_S."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1)))
    nb = nbformat.read(book, 4)
    where = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(nb, timeout=HANGS_S, kernel_name="python3", resources=where).execute()
    assert all(c.execution_count for c in nb.cells if c.cell_type == "code")
