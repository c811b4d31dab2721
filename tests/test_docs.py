"""The pages under docs/ say what the code says."""

from __future__ import annotations

import runpy
from pathlib import Path

import lora_core as lc
from lora_core.experiments import experiments

ROOT = Path(__file__).parents[1]


def test_the_api_page_is_the_docstrings() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "api_page.py"))["page"]()
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == made, "run `make docs`"


def test_the_page_to_play_on_is_the_tab() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "play_page.py"))["page"]()
    assert (ROOT / "docs" / "play.html").read_text(encoding="utf-8") == made, "run `make docs`"


def test_every_public_name_is_explained() -> None:
    for name in dir(lc):
        assert (getattr(lc, name).__doc__ or "").strip(), name


def test_a_file_that_the_package_imports_first_does_not_hide_its_function() -> None:
    import lora_core.train  # noqa: F401

    assert callable(lc.train) and lc.train.__module__ == "lora_core.train"


def test_the_page_about_the_paper_says_what_the_result_files_say() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "paper_page.py"))
    text = (ROOT / "docs" / "read_the_paper.md").read_text(encoding="utf-8")
    assert made["filled"](text) == text, "run `make docs`"
    asked = [name for _, name, _ in made["BLOCK"].findall(text)]
    assert sorted(asked) == sorted(e.name for e in experiments()), "every question has its place"


def test_the_readmes_measurements_are_those_of_the_result_files() -> None:
    from benchmarks.table import BEGIN, END, table

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0] == f"\n{table()}\n"
