"""What an experiment is, and what it gives. No torch here: a list of them costs nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from lora_core.errors import UserError
from lora_core.frames import frame

if TYPE_CHECKING:
    import pandas

    from lora_core.experiments.lab import Lab

Row = dict[str, Any]
HOLDS, PARTLY, NOT, UNDECIDED = "holds", "holds partly", "does not hold here", "undecided"
VERDICTS = (HOLDS, PARTLY, NOT, UNDECIDED)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One question of the paper (arXiv 2106.09685) that is answered by measuring.

    section  where the paper speaks of it; claim: what it says there, in our words
    choices  three answers to guess from before the result is shown; answer: the index of the one that the paper gives
    paper    the paper's own numbers, as rows like ours where it has them
    run      does the measuring: rows of plain JSON values, the same rows for whoever draws or judges them
    judge    (verdict, one sentence made from the numbers) for rows
    """

    name: str
    question: str
    section: str
    claim: str
    choices: tuple[str, str, str]
    answer: int
    paper: Mapping[str, Any]
    run: Callable[[Lab], list[Row]] = field(repr=False, compare=False)
    judge: Callable[[Sequence[Row]], tuple[str, str]] = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """All but how it is done, as plain JSON values."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("run", "judge", "choices")} | {
            "choices": list(self.choices), "paper": dict(self.paper)}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Result:
    """What an experiment found.

    verdict   "holds", "holds partly", "does not hold here", or "undecided": the spread is too wide to say
    sentence  the verdict in words, made from the rows
    rows      all measurements
    quick     whether it is the short version, on fewer steps, settings and rows
    seconds   of work, over all the sittings that it took; model: what it ran on; machine: where
    command   the command line that makes it again; seeds: what was repeated with
    made      the day on which it was finished, as 2026-11-24; "" where that was not noted
    """

    name: str
    question: str
    claim: str
    verdict: str
    sentence: str
    rows: tuple[Row, ...]
    quick: bool
    seconds: float
    model: str
    machine: Mapping[str, Any]
    command: str
    seeds: tuple[int, ...]
    made: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return {**asdict(self), "rows": [dict(r) for r in self.rows], "seeds": list(self.seeds)}

    def to_frame(self) -> pandas.DataFrame:
        """All measurements as a pandas DataFrame: a row for each."""
        return frame(self.rows)

    def to_json(self) -> str:
        """The text of a result's file: one line for each row."""
        rows = ",\n  ".join(json.dumps(r, ensure_ascii=False) for r in self.rows)
        head = json.dumps({**self.to_dict(), "rows": []}, indent=1, ensure_ascii=False)
        return head.replace('"rows": []', f'"rows": [\n  {rows}\n ]', 1) + "\n"

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Result:
        """Inverse of `to_dict`; UserError for what is no result."""
        if {f.name for f in fields(cls)} != {*d, "made"} or d["verdict"] not in VERDICTS:
            raise UserError("this is no result of an experiment")
        return cls(**{**d, "rows": tuple(d["rows"]), "seeds": tuple(d["seeds"])})
