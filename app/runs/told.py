"""What an archive says of a run, read as data from anybody: types, lengths and finite numbers, and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.runs.run import Run, RunRequest
from lora_core.errors import UserError

Count = Field(default=0, ge=0, le=10**9)
Time = Field(default=None, ge=0, le=1e12)
MOST_EVENTS, DEEPEST, MOST_VALUES = 1_000_000, 12, 20_000
KINDS = ("status", "base", "step", "held", "end", "score")


class Told(BaseModel):
    """A run that is over, without what belongs to one machine: its number, its process, its folder."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    status: Literal["done", "stopped", "diverged", "failed", "interrupted"]
    request: dict[str, Any]
    created: float = Field(ge=0, le=1e12)
    started: float | None = Time
    ended: float | None = Time
    attempts: int = Count
    step: int = Count
    steps: int = Count
    base_loss: float | None = None
    loss: float | None = None
    score: dict[str, Any] | None = None
    result: dict[str, Any] = Field(default_factory=dict)
    error: str | None = Field(default=None, max_length=2000)
    adapter: bool = False

    @classmethod
    def read(cls, data: bytes, name: str) -> Told:
        """From the bytes of run.json; UserError that names what is wrong."""
        value = strict_json(data, f"{name}/run.json")
        try:
            told = cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))[:80]
            raise UserError(f"{name}/run.json: {where}: {first['msg']}") from None
        told.request_of()
        for part in (told.score, told.result):
            plain(part, f"{name}/run.json")
        score = told.score
        if score is not None and not (isinstance(score.get("name"), str) and all(
                isinstance(score.get(k), dict) for k in ("base", "adapted"))):  # fmt: skip
            raise UserError(f"{name}/run.json: its score has no name, base and adapted")
        return told

    def request_of(self) -> RunRequest:
        """The request, checked as one that is asked for now; UserError where it is none."""
        return RunRequest.from_dict({str(k): v for k, v in self.request.items()})

    def check_files(self, folder: Path, name: str) -> None:
        """Whether what this says is in the run's folder is there, and nothing else."""
        request = self.request_of()
        for file, given in (("data", request.data), ("test", request.test)):
            there = [p.name for p in folder.glob(f"{file}.*")]
            if there != ([f"{file}{Path(given).suffix.lower()}"] if given is not None else []):
                raise UserError(f"{name} was trained on {given or 'a task'}, and comes with {there or 'no'} "
                                f"{file} file")  # fmt: skip
        if self.adapter != (folder / "adapter").is_dir():
            raise UserError(f"{name} says that it has {'an' if self.adapter else 'no'} adapter, and it is otherwise")

    def values(self, adapter: Path) -> dict[str, Any]:
        """The columns of its row in the store."""
        kept = self.model_dump(exclude={"request"})
        return kept | {"adapter": adapter.is_dir()}


def told_of(run: Run) -> Told:
    """What is told of a run; file names without their folders."""
    d = run.to_dict()
    kept = {k: d[k] for k in Told.model_fields if k not in ("request", "adapter")}
    kept = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in kept.items()}
    there = run.adapter is not None and run.adapter.is_dir()
    return Told.model_validate({**kept, "request": run.request.shareable().to_dict(), "adapter": there}, strict=False)


def strict_json(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object without NaN, infinities and names given twice. UserError for anything else."""

    def number(text: str) -> Any:
        raise ValueError(f"{text} is no number")

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(found)) != len(found):
            raise ValueError("a name is given twice")
        return dict(found)

    try:
        value = json.loads(data, parse_constant=number, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is no JSON: {str(error)[:120]}") from None
    if not isinstance(value, dict):
        raise UserError(f"{name} is no JSON object")
    return value


def read_events(path: Path, name: str) -> None:
    """Look through a run's events; UserError for a line that no training writes."""
    if not path.exists():
        return
    with open(path, "rb") as f:
        for i, line in enumerate(f, 1):
            where = f"{name}/events.jsonl, line {i:,}"
            if i > MOST_EVENTS:
                raise UserError(f"{where}: at most {MOST_EVENTS:,} events are taken")
            event = strict_json(line, where)
            if event.get("kind") not in KINDS:
                raise UserError(f"{where}: its kind is {str(event.get('kind'))[:40]!r}; those are {' '.join(KINDS)}")
            if not isinstance(event.get("step", 0), int) or isinstance(event.get("step"), bool):
                raise UserError(f"{where}: its step is no whole number")
            for key in ("loss", "held_loss", "lr", "seconds", "tokens_per_s", "grad_norm"):
                if not isinstance(event.get(key, 0.0), (int, float, type(None))) or isinstance(event.get(key), bool):
                    raise UserError(f"{where}: its {key} is no number")
            for key, numbers in (("norms", (int, float)), ("sigma", list)):
                table = event.get(key) or {}
                if not isinstance(table, dict) or not all(isinstance(v, numbers) for v in table.values()):
                    raise UserError(f"{where}: its {key} are no numbers by matrix")
            plain(event, where)


def plain(value: Any, where: str, depth: int = 0) -> None:
    """Whether a JSON value is of sensible size: UserError where it is nested or long beyond what a run has."""
    if depth > DEEPEST or isinstance(value, (list, dict)) and len(value) > MOST_VALUES:
        raise UserError(f"{where}: its values are nested too deeply, or too many")
    if isinstance(value, str) and len(value) > MOST_VALUES:
        raise UserError(f"{where}: a text of {len(value):,} characters is too long")
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for one in inner:
        plain(one, where, depth + 1)
