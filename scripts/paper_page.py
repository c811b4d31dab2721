"""Fills docs/read_the_paper.md with what our experiments found: everything between its marks. `make docs` runs it.

A block begins with `<!-- result: NAME -->` and ends with `<!-- end -->`. A test holds the page against
the result files.
"""

from __future__ import annotations

import re
from pathlib import Path

from lora_core.experiments import find_experiment, stored_result
from lora_core.experiments.experiment import HOLDS, NOT, PARTLY

PAGE = Path(__file__).parents[1] / "docs" / "read_the_paper.md"
BLOCK = re.compile(r"(<!-- result: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)
WORDS = {HOLDS: "Holds here", PARTLY: "Holds partly here", NOT: "Does not hold here"}


def block(name: str) -> str:
    """What was found, as a quotation of a few lines: the verdict, the numbers in a sentence, and how to do it again."""
    e, found = find_experiment(name), stored_result(name)
    if found is None:
        return f"> Not measured yet. `lora-lab experiment run {e.name}`\n"
    kind = "a quick run" if found.quick else "a full run"
    seeds = f"{len(found.seeds)} seeds" if len(found.seeds) > 1 else "one seed"
    return (f"> **{WORDS.get(found.verdict, 'Undecided here')}.** {found.sentence}\n>\n"
            f"> <sub>{kind} on {found.model}, {seeds}, {found.seconds / 60:.0f} min on {found.machine['chip']}:"
            f" `{found.command}`</sub>\n")  # fmt: skip


def filled(text: str) -> str:
    """The page with every block as the result files have it now."""
    return BLOCK.sub(lambda m: f"{m[1]}{block(m[2])}{m[3]}", text)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
