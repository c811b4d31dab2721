"""What the rooms share: the run store and its queue, the model, the user's files; and how a choice becomes a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.pages import owners
from app.pages.opened import Sets
from app.pages.session import ModelSession
from app.pages.uploads import Uploads
from app.pages.visitor import asking
from app.runs.experiments import ExperimentRunner
from app.runs.queue import RunQueue
from app.runs.run import Run
from app.runs.store import RunStore
from lora_core.errors import UserError

if TYPE_CHECKING:
    from app.pages.room import OpenRoom
    from lora_core.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Lab:
    """Everything that a request may need."""

    store: RunStore
    queue: RunQueue
    session: ModelSession
    uploads: Uploads
    experiments: ExperimentRunner
    room: OpenRoom | None = None

    @property
    def sets(self) -> Sets:
        """The adapters from elsewhere that were opened."""
        return Sets(self.store.root.parent)

    def run(self, text: Any) -> Run:
        """The run of a number that came with a request, if whoever asks may see it."""
        if isinstance(text, str) and text.isdigit() and len(text) < 16:
            text = int(text)
        if isinstance(text, bool) or not isinstance(text, int):
            raise UserError(f"'{text}' is no run; runs have numbers, such as 14")
        return owners.found(self.store, text)

    def own(self, text: Any) -> Run:
        """The same to be changed: UserError for somebody else's."""
        return owners.own(self.run(text))

    def runs(self, limit: int) -> list[Run]:
        """The newest runs that whoever asks may see."""
        return owners.listed(self.store, limit)

    def newest(self) -> Run | None:
        """The run to show to somebody who asks for none: the latest of their own, else the recorded one."""
        own = self.runs(1)
        return own[0] if own else self.store.recorded()

    def task(self, choice: Mapping[str, Any], tokenizer: Any = None) -> Task:
        """The task of a choice: {"task": name} or {"file": upload's id}, with "seed" and "max_tokens"."""
        from lora_core.tasks import load_data

        seed = choice.get("seed", 0)
        if choice.get("file"):
            more = {"max_tokens": choice["max_tokens"]} if choice.get("max_tokens") else {}
            return load_data(self.uploads.path(str(choice["file"])), seed=seed, tokenizer=tokenizer, **more)
        if not choice.get("task"):
            raise UserError("choose a task, or a file of your own")
        return built_in(str(choice["task"]), seed)

    def data_of(self, run: Run) -> tuple[str, str] | None:
        """(id, name) of a run's own file, put where the form can use it again; None for a built-in task."""
        if run.request.data is None or not asking.get().may_see(run.owner):
            return None
        copy = run.folder / f"data{Path(run.request.data).suffix.lower()}"
        if not copy.exists():
            return None
        return self.uploads.adopt(copy, run.request.data_name)


@lru_cache(maxsize=16)
def built_in(name: str, seed: int) -> Task:
    from lora_core.tasks import load_task

    return load_task(name, seed=seed)


def task_of_run(run: Run, tokenizer: Any = None) -> Task:
    """The task of a run, with the rows that it trained on and held out."""
    from app.runs.session import task_of

    owners.rows(run)
    if run.request.task is not None:
        task = built_in(run.request.task, int(run.request.config.get("seed", 0)))
        return replace(task, template=run.request.template) if run.request.template else task
    return task_of(run, tokenizer=tokenizer)


def title(run: Run) -> str:
    """How a run is called in a sentence: "run 14", or "the recorded run"."""
    return "the recorded run" if run.recorded else f"run {run.id}"
