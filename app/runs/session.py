"""What a run trains: the model, the task and the adapter that a request asks for, ready to go."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from app.runs.film import Film
from app.runs.fits import check_request
from app.runs.folder import CHECKPOINT
from app.runs.run import Run, RunRequest

if TYPE_CHECKING:
    from lora_core.tasks import Task

SCORED_ROWS, MEASURED_ROWS = 16, 256  # held-out rows that texts are generated for, and that are read alone
HEADLINE = {"classify": "accuracy", "preference": "preferred"}
LATER = ("lora_core.files", "lora_core.saving", "lora_core.evaluate", "lora_core.generate", "lora_core.tasks.scores",
         "lora_core.classification", "lora_core.preference", "lora_core.changed", "lora_core.spectra")  # fmt: skip
Stop = Callable[[], bool]


class Session(Protocol):
    """What the worker needs of a training: events, the adapter on disk, a score. Tests have one without a model."""

    def train(self, stop: Stop) -> Iterator[dict[str, Any]]:
        """Events as `TrainEvent.to_dict()` gives them; after `stop` says True the run ends, with its adapter kept.

        Some have "sigma" as well, {key: the singular values of ΔW}.
        """
        ...

    def save(self, folder: Path, info: Mapping[str, Any]) -> None:
        """Write the adapter as it is now."""
        ...

    def score(self, stop: Stop) -> dict[str, Any] | None:
        """{"name", "base": {…}, "adapted": {…}, "rows"}, or None for a task without a score, or when stopped."""
        ...

    def effect(self, events: Sequence[Mapping[str, Any]], stop: Stop) -> dict[str, Any] | None:
        """`Effect.to_dict()` of a training whose events these were; None where there is no telling."""
        ...

    def facts(self) -> dict[str, Any]:
        """For `Run.result`: objective, dtype, device, trainable, peak_bytes; labels of a classifier."""
        ...


OpenSession = Callable[[RunRequest, Path], Session]


def open_session(request: RunRequest, folder: Path, anyway: bool = False) -> Session:
    """Load the model and attach a fresh adapter; a checkpoint in `folder` is continued from. May raise UserError.

    anyway: also where the memory that is free will not do
    """
    return _Training(request, folder, anyway)


def task_of(run: Run | RunRequest, folder: Path | None = None, tokenizer: Any = None) -> Task:
    """The task of a run, with the very rows that were trained on and held out; needs no model.

    folder: the run's, where the copies of the user's files are (a Run knows its own)
    """
    from lora_core.tasks import load_data, load_task

    request = run.request if isinstance(run, Run) else run
    folder = run.folder if isinstance(run, Run) else folder
    seed = int(request.config.get("seed", 0))
    if request.task is not None:
        task = load_task(request.task, seed=seed)
        return replace(task, template=request.template) if request.template else task
    data, test = (_kept(folder, name, given) for name, given in (("data", request.data), ("test", request.test)))
    assert data is not None
    more: dict[str, Any] = {k: request.config[k] for k in ("max_tokens",) if k in request.config}
    task = load_data(data, test=test, seed=seed, template=request.template, tokenizer=tokenizer, **more)
    name = Path(request.data_name)
    return replace(task, name=name.stem, source=name.name)


def _kept(folder: Path | None, name: str, given: str | None) -> Path | None:
    """The copy of a user's file in the run's folder, or the file itself where there is no copy."""
    if given is None:
        return None
    copy = folder / f"{name}{Path(given).suffix.lower()}" if folder else None
    return copy if copy and copy.exists() else Path(given)


class _Training:
    """The real session: lora_core's train on lora_core's model."""

    def __init__(self, request: RunRequest, folder: Path, anyway: bool = False) -> None:
        import lora_core as lc
        from lora_core.classification import drawn_modules
        from lora_core.errors import UserError
        from lora_core.models import kind_of
        from lora_core.objective import choose, objective_for

        for name in LATER:  # now: an update of LoRA Lab in the midst of a run must not mix two versions of it
            importlib.import_module(name)
        self.config = lc.TrainConfig.from_dict(request.config)
        spec = lc.LoraSpec.from_dict(request.spec)
        self.task = task_of(request, folder)  # a file that cannot be read is told before a model is loaded
        encoder = kind_of(request.model) == "encoder"
        name = request.objective or "auto"
        if name == "auto":
            name = choose(encoder, self.task.train)
        if encoder and name != "classify":
            raise UserError(f"{request.model} is an encoder, which writes no text: its objective is classify")
        load: dict[str, Any] = {"device": self.config.device, "dtype": self.config.dtype}
        if name == "classify":
            if request.template is not None:
                raise UserError("a classifier reads the text as it stands: leave the template out")
            load["labels"] = lc.labels_of(self.task)
        if not anyway:
            labels = load.get("labels")
            check_request(request.model, spec, self.config, self.task, len(labels) if labels else None)
        self.model, self.tokenizer = lc.load_model(request.model, **load)
        if name == "classify":  # a new head is trained, whether or not the user thought of it
            spec = replace(spec, full=tuple(dict.fromkeys([*spec.full, *drawn_modules(self.model)])))
        else:
            self.task = task_of(request, folder, self.tokenizer)
        self.adapter = lc.attach(self.model, spec, name="run", seed=self.config.seed)
        self.objective = objective_for(name, self.adapter, self.task, self.tokenizer, self.config)
        self.checkpoint = folder / CHECKPOINT

    def train(self, stop: Stop) -> Iterator[dict[str, Any]]:
        import lora_core as lc
        from lora_core.estimate import estimate, learn
        from lora_core.preference import PASSES

        more: dict[str, Any] = {"tokenizer": self.tokenizer, "stop": stop, "checkpoint": self.checkpoint}
        passes = PASSES if self.objective.name == "preference" else 1.0
        first: lc.TrainEvent | None = None
        film = Film(self.adapter, self.config.steps)
        for event in lc.train(self.adapter, self.task, self.config, objective=self.objective, **more):
            first = first or event
            sigma = None
            if event.kind == "base":
                sigma = film.begin(event.train_s)
            elif event.kind in ("step", "end"):
                sigma = film.after(event.step, event.train_s, end=event.kind == "end")
            yield event.to_dict() | ({"sigma": sigma} if sigma else {})
            if event.kind == "end":  # what this run took makes the next estimate better
                spec, steps = self.adapter.spec, event.step - first.step
                each = estimate(self.model, spec, self.task, self.config, self.tokenizer, self.objective).tokens
                learn(self.model, spec, steps=steps, tokens=steps * each,
                      train_s=(event.train_s - first.train_s) / passes)  # fmt: skip

    def save(self, folder: Path, info: Mapping[str, Any]) -> None:
        name = getattr(getattr(self.model, "lora_lab", None), "name", None)
        more = {"model": name} if name else {}
        more |= {"task": self.task.name, "template": self.task.template, "source": self.task.source}
        self.adapter.save(folder, {**info, **more, "suggested": dict(self.task.suggested)})

    def score(self, stop: Stop) -> dict[str, Any] | None:
        import lora_core as lc
        from lora_core.evaluate import spread

        if not self.config.eval_rows:  # nothing is to be measured
            return None
        headline = HEADLINE.get(self.objective.name, self.task.score_name)
        measured = spread(self.task.test, MEASURED_ROWS) if self.objective.name in HEADLINE else []
        rows = self.task.score_rows(SCORED_ROWS) if self.objective.name != "classify" else ()
        if not measured and not rows:
            return None
        cut = False

        def stop_and_tell() -> bool:
            nonlocal cut
            cut = cut or stop()
            return cut

        more: dict[str, Any] = {"adapters": [None, "run"], "stop": stop_and_tell}
        found: dict[str | None, dict[str, float]] = {None: {}, "run": {}}
        if measured:
            found = lc.measure(self.objective, measured, **more)
        if rows and not cut:
            texts = lc.score(self.model, self.tokenizer, self.task, limit=len(rows), **more)
            found = {name: found[name] | texts[name] for name in found}
        if cut:  # texts that end early would be scored too low
            return None
        base, adapted = ({k: v for k, v in found[name].items() if k != "loss"} for name in (None, "run"))
        return {"name": headline, "base": base, "adapted": adapted, "rows": len(measured or rows)}

    def effect(self, events: Sequence[Mapping[str, Any]], stop: Stop) -> dict[str, Any] | None:
        from lora_core.changed import measure_effect

        return measure_effect(self.adapter, self.task, self.config, events, objective=self.objective,
                              stop=stop).to_dict()  # fmt: skip

    def facts(self) -> dict[str, Any]:
        from lora_core.machine import peak_bytes

        weight = next(p for p in self.model.parameters() if not p.requires_grad)
        labels = getattr(self.objective, "labels", None)
        return {
            "objective": self.objective.name,
            **({"labels": list(labels)} if labels else {}),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "device": weight.device.type,
            "peak_bytes": peak_bytes(weight.device.type),
            "trainable": sum(p.numel() for p in self.adapter.parameters()),
        }
