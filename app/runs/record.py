"""Makes the run that comes with LoRA Lab: `python -m app.runs.record RUN_ID DEST` copies a finished run there.

RUN_ID 0 and the folder of the recorded run bring that one up to date: what it did is measured where it was not.

What is written: run.json (the run, and the command that makes it again), events.jsonl, adapter/, texts.json with the
texts of both models for a few held-out prompts and the probability of every token of them, and held.json with the
held-out losses along the page's dials.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from app.runs.events import NAME, read_all
from app.runs.folder import ADAPTER
from app.runs.recorded import RUN, TEXTS
from app.runs.run import Run, command_line
from app.runs.session import task_of
from app.runs.store import RunStore
from lora_core.errors import UserError
from lora_core.home import writing

EXAMPLES = 6
HELD = "held.json"
MOST_BYTES = 2 << 20  # of the adapter
KEPT = ("status", "created", "started", "ended", "attempts", "step", "steps", "base_loss", "loss", "score", "result")


def record(store: RunStore, run_id: int, destination: Path, examples: int = EXAMPLES) -> Path:
    """Copy a finished run to `destination` in the shape of the recorded one; replaces what is there.

    Raises UserError for a run that is not done, an adapter of more than 2 MB, or a folder that holds something else.
    """
    run = store.get(run_id)
    if run.status != "done" or run.adapter is None:
        raise UserError(f"run {run_id} is {run.status}; only a run that is done can be recorded")
    size = sum(p.stat().st_size for p in run.adapter.iterdir())
    if size > MOST_BYTES:
        raise UserError(f"the adapter of run {run_id} has {size:,} bytes; at most {MOST_BYTES:,} are recorded")
    if destination.exists() and any(destination.iterdir()) and not (destination / RUN).exists():
        raise UserError(f"{destination} is not empty and holds no recorded run; name another folder")
    request = run.request.shareable()
    command = command_line(request)
    new = destination.with_name(f".{destination.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        with writing(destination.parent):
            new.mkdir(parents=True)
            shutil.copytree(run.adapter, new / ADAPTER)
            kept = {k: run.to_dict()[k] for k in KEPT} | {"request": request.to_dict()}
            opened = Opened(run)
            if "effect" not in run.result:
                kept["result"] = {**run.result, "effect": opened.effect()}
            write(new / RUN, {"command": command, **kept})
            events = [e for e in read_all(run.folder / NAME) if e.get("kind") != "status"]
            (new / NAME).write_text("".join(json.dumps(e, separators=(",", ":")) + "\n" for e in events))
            write(new / TEXTS, {"command": command, "examples": opened.texts(examples)})
            if (losses := opened.losses()) is not None:
                (new / HELD).write_text(json.dumps(losses, separators=(",", ":")) + "\n")
            shutil.rmtree(destination, ignore_errors=True)
            new.rename(destination)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return destination


class Opened:
    """A finished run with its model, its adapter and its task."""

    def __init__(self, run: Run) -> None:
        import lora_core as lc

        assert run.adapter is not None
        config = {**run.request.config} | {k: run.result[k] for k in ("dtype",) if k in run.result}
        load: dict[str, Any] = {k: config.get(k, "auto") for k in ("device", "dtype")}
        self.run = run
        self.model, self.tokenizer = lc.load_model(run.request.model, **load)
        self.adapter = lc.load_adapter(self.model, run.adapter, name="run")
        self.task = task_of(run, tokenizer=self.tokenizer)

    def effect(self) -> dict[str, Any]:
        """What the training did, as the worker writes it down at the end of a run."""
        import lora_core as lc

        config, events = lc.TrainConfig.from_dict(self.run.request.config), read_all(self.run.folder / NAME)
        return lc.measure_effect(self.adapter, self.task, config, events, tokenizer=self.tokenizer).to_dict()

    def losses(self) -> dict[str, Any] | None:
        """The held-out losses along the dials, as the page would measure them; what is kept beside the run is not
        measured again. None for a run that has none."""
        from app.pages.along import all_of_it  # the page's measurement, so that what ships is what it would find

        try:
            return all_of_it(self.run, self.model, "run", self.tokenizer, self.task).kept()
        except UserError:
            return None

    def texts(self, examples: int = EXAMPLES) -> list[dict[str, Any]]:
        """[{"prompt", "reference", "base", "adapted", "tokens"}] for the first held-out prompts of the task.

        tokens: `TokenDiff.to_dict()` of every token of the adapted text, numbers to four digits
        """
        import lora_core as lc
        from lora_core.tasks import prompt_text

        model, tokenizer, task = self.model, self.tokenizer, self.task
        rows = task.score_rows(examples) or task.test[:examples]
        prompts = [prompt_text(tokenizer, row, task.template) for row in rows]
        longest = int(task.suggested.get("max_new_tokens", 64))
        *_, last = lc.generate(model, tokenizer, prompts, [None, "run"], max_new_tokens=longest)
        found = []
        for row, (base, adapted) in zip(rows, last.texts, strict=True):
            tokens = lc.token_differences(model, tokenizer, row.prompt, adapted, "run", template=task.template)
            found.append(
                {"prompt": row.prompt, "reference": row.completion, "base": base.strip(), "adapted": adapted.strip()}
                | {"tokens": [rounded(t.to_dict()) for t in tokens]}
            )
        return found


def rounded(value: Any) -> Any:
    """Numbers to four digits after the point, all the way down: they are looked at, not computed with."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m app.runs.record", description="record a finished run")
    parser.add_argument("run", type=int, help="the run's number")
    parser.add_argument("destination", type=Path, help="the folder to write, for example app/recorded")
    given = parser.parse_args(arguments)
    try:
        folder = record(RunStore(), given.run, given.destination.absolute())
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"recorded run {given.run} in {folder}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
