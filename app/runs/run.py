"""What a run is: the request it was made from, where it stands, and how it is told in a few words."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from lora_core.errors import UserError, unknown

Status = Literal["queued", "running", "done", "stopped", "diverged", "failed", "interrupted"]
RESUMABLE: tuple[Status, ...] = ("interrupted", "stopped", "failed")
ENDED: tuple[Status, ...] = ("done", "stopped", "diverged", "failed", "interrupted")
OBJECTIVES = ("auto", "lm", "classify", "preference")
LONGEST_TITLE, LONGEST_NAME = 200, 4096


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What to train. Checked when it is made, as far as that needs no model; raises UserError.

    model    as for `lora_core.load_model`
    task     a built-in task, or None when `data` is given
    data     a file of the user's (test: one with held-out rows); `RunStore.create` copies it into the run's folder
    spec     LoraSpec.to_dict(), config: TrainConfig.to_dict(); keys that are left out mean the default
    objective  "lm", "classify" or "preference"; None or "auto": what fits the model and the rows
    template, title  None unless the user gave one
    """

    model: str
    task: str | None = None
    data: str | None = None
    test: str | None = None
    spec: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None
    title: str | None = None
    objective: str | None = None

    def __post_init__(self) -> None:
        from lora_core.spec import LoraSpec

        for name in ("model", "task", "data", "test", "template", "title", "objective"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise UserError(f"{name} is {value!r}; it must be text")
            most = LONGEST_TITLE if name == "title" else LONGEST_NAME
            if value is not None and len(value) > most:
                raise UserError(f"{name} has {len(value):,} characters; at most {most:,} are kept")
        if not self.model:
            raise UserError("a run needs a model")
        if (self.task is None) == (self.data is None):
            given = "neither" if self.task is None else "both"
            raise UserError(f"a run needs either a task or a data file; {given} given")
        if self.test is not None and self.data is None:
            raise UserError("a file of held-out rows goes with a data file; the built-in tasks bring their own")
        if self.objective not in (None, *OBJECTIVES):
            raise unknown("objective", str(self.objective), OBJECTIVES)
        object.__setattr__(self, "spec", LoraSpec.from_dict(self.spec).to_dict())
        object.__setattr__(self, "config", _plain(self.config))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"spec": dict(self.spec), "config": dict(self.config)}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> RunRequest:
        """Inverse of `to_dict`; a key that is no field is a UserError."""
        known = [f.name for f in fields(cls)]
        for key in d:
            if key not in known:
                raise unknown("setting", str(key), known, "RunRequest")
        return cls(**{"model": "", **d})

    @classmethod
    def stored(cls, d: Mapping[str, Any]) -> RunRequest:
        """A request that was checked when it was written down; listing thousands of runs checks none again."""
        request = object.__new__(cls)
        request.__dict__.update(dict.fromkeys(cls.__dataclass_fields__) | dict(d))
        return request

    def shareable(self) -> RunRequest:
        """The same with the names of the user's files alone: what their folders are called is nobody's business."""
        names = {k: Path(v).name if v else v for k, v in (("data", self.data), ("test", self.test))}
        return RunRequest.stored(self.to_dict() | names)

    @property
    def data_name(self) -> str:
        """What is trained on, for people: the task's name, or the file's without its folder."""
        return self.task or Path(self.data or "").name


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run as the store knows it; `status` says how far it is.

    id         a small number, "run 14" for people; 0 is the recorded run that comes with LoRA Lab
    created, started, ended  seconds since 1970; started: of the last attempt
    attempts   how often a worker began it; when it grows, `events` begin anew from the last checkpoint
    step, steps  optimiser steps done and asked for
    base_loss, loss  held-out loss in nats a token: of the base model, and the latest of the adapted one
    score      {"name", "base": {score: value}, "adapted": {score: value}, "rows"} once the run is over, or None
    result     what the end of the run says about it: train_s, tokens_per_s, dtype, device, trainable, peak_bytes, …
    error      one line for a person when it failed, diverged or was interrupted
    adapter    the folder in PEFT's format, or None while there is none
    position   place in the queue, from 1, while it waits there
    owner      whose it is: a participant's random id, or "" for whoever the machine belongs to
    shared     whether everybody in the room may read it
    """

    id: int
    status: Status
    request: RunRequest
    folder: Path
    created: float
    started: float | None = None
    ended: float | None = None
    attempts: int = 0
    step: int = 0
    steps: int = 0
    base_loss: float | None = None
    loss: float | None = None
    score: Mapping[str, Any] | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    adapter: Path | None = None
    position: int | None = None
    pid: int | None = None
    process: str | None = None
    recorded: bool = False
    owner: str = ""
    shared: bool = False

    @property
    def name(self) -> str:
        """ "run 14", or the title that the user gave."""
        return self.request.title or ("recorded run" if self.recorded else f"run {self.id}")

    @property
    def live(self) -> bool:
        """Whether it waits or is being trained."""
        return self.status in ("queued", "running")

    def to_dict(self) -> dict[str, Any]:
        d = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "process"}
        return d | {"name": self.name, "request": self.request.to_dict(), "folder": str(self.folder),
                    "adapter": str(self.adapter) if self.adapter else None,
                    "result": dict(self.result), "score": dict(self.score) if self.score else None}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One setting in which two runs differ, in words: `label` "r", `this` "8", `other` "4"."""

    name: str
    label: str
    this: str
    other: str


LABELS = {
    **{"model": "model", "data": "data", "test": "held-out file", "template": "template", "targets": "matrices"},
    **{"rank": "r", "alpha": "α", "layers": "layers", "scaling": "scaling", "init": "start", "train_A": "A is trained"},
    **{"dropout": "dropout", "lr_ratio": "B's rate over A's"},
    **{"rank_pattern": "ranks by matrix", "alpha_pattern": "α by matrix", "steps": "steps", "batch_size": "batch"},
    **{"lr": "learning rate", "schedule": "schedule", "warmup": "warm-up", "weight_decay": "weight decay"},
    **{"clip": "clipping", "accumulate": "accumulation", "seed": "seed", "max_tokens": "longest row"},
    **{"dtype": "number format", "device": "device", "objective": "objective", "beta": "β"},
    **{"dora": "DoRA", "mask": "mask", "full": "trained in full"},
    **{"bottleneck": "adapter layers", "prefix": "prefix"},
}


def describe(run: Run | RunRequest) -> str:
    """The adapter's settings in a short phrase: "q v · r 8", and what else is not as usual."""
    from lora_core.spec import LoraSpec

    given = (run.request if isinstance(run, Run) else run).spec
    spec = {**LoraSpec().to_dict(), **given}  # a run of before knows nothing of newer settings
    parts = [_words("targets", spec["targets"])] if spec["targets"] else []
    parts += [f"r {spec['rank']}"] if set(spec["targets"]) - {"norm", "bias"} else []
    parts += [f"{name} {spec[name]}" for name in ("bottleneck", "prefix") if spec[name]]
    parts += [f"{_words('full', spec['full'])} in full"] if spec["full"] and not spec["targets"] else []
    parts += ["DoRA"] if spec["dora"] else []
    if spec["layers"] != "all":
        parts.append(f"layers {_words('layers', spec['layers'])}")
    if spec["scaling"] != "alpha/r":
        parts.append("α/√r")
    return " · ".join(parts)


def settings(run: Run | RunRequest) -> dict[str, Any]:
    """All settings of a run that have a word in LABELS, None where it names none."""
    request = run.request if isinstance(run, Run) else run
    flat: dict[str, Any] = {"model": request.model, "data": request.data_name, "template": request.template}
    flat |= {"test": Path(request.test).name if request.test else None, **request.spec, **request.config}
    flat |= {"objective": request.objective or "auto"}
    return {k: flat.get(k) for k in LABELS}


def difference(run: Run | RunRequest, other: Run | RunRequest) -> list[Difference]:
    """The settings that differ, in the order of LABELS; one that a run does not name counts as equal."""
    mine, theirs = settings(run), settings(other)
    return [Difference(name=k, label=LABELS[k], this=_words(k, mine[k]), other=_words(k, theirs[k])) for k in LABELS
            if mine[k] != theirs[k] and (k in ("test", "template") or None not in (mine[k], theirs[k]))]  # fmt: skip


def difference_sentence(run: Run | RunRequest, other: Run | RunRequest) -> str:
    """ "r 8 instead of 4, steps 60 instead of 30"; "the same settings" when nothing differs."""
    found = difference(run, other)
    return ", ".join(f"{d.label} {d.this} instead of {d.other}" for d in found) or "the same settings"


# Options that the command line need not be given when they are as usual; the others are always written out.
USUAL = {
    **{"layers": "all", "scaling": "alpha/r", "init": "gaussian", "dropout": 0.0, "schedule": "linear", "warmup": 0.05},
    **{"weight_decay": 0.0, "clip": 1.0, "accumulate": 1, "eval_rows": 64, "eval_every": 0, "max_tokens": 256},
    **{"lr_ratio": 1.0, "dtype": "auto", "device": "auto", "template": None, "title": None, "test": None},
    **{"mask": 0.0, "beta": 0.1, "objective": "auto"},
}


def command_line(request: RunRequest, out: str = "DIR") -> str:
    """The command that makes this run again."""
    s, c = request.spec, request.config
    layers = s["layers"] if s["layers"] == "all" else ",".join(map(str, s["layers"]))
    words = {"model": request.model, "task": request.task, "data": request.data, "test": request.test}
    words |= {"targets": ",".join(s["targets"]), "rank": s["rank"], "alpha": s["alpha"], "layers": layers}
    words |= {k: c.get(k) for k in ("steps", "batch_size", "lr", "seed")}
    words |= {k: s.get(k, c.get(k)) for k in USUAL if k in s and k != "layers" or k in c}
    words |= {"full": ",".join(s.get("full") or ()) or None, "objective": request.objective}
    words |= {k: s.get(k) or None for k in ("bottleneck", "prefix")}
    words |= {"template": request.template, "title": request.title, "out": out}
    parts = [f"--{k.replace('_', '-')} {shlex.quote(_exact(v) if isinstance(v, float) else str(v))}"
             for k, v in words.items() if v is not None and v != USUAL.get(k)]  # fmt: skip
    flags = [*([] if s.get("train_A", True) else ["--freeze-a"]), *(["--dora"] if s.get("dora") else [])]
    return " ".join(["lora-lab train", *parts, *flags])


def _exact(value: float) -> str:
    """A number in its shortest form that is read back as the same one."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _words(name: str, value: Any) -> str:
    """A setting's value as people read it."""
    if name in ("targets", "full") and value:
        return " ".join(value)
    if name == "layers" and not isinstance(value, str):
        n = sorted(value)
        return f"{n[0]}–{n[-1]}" if len(n) > 2 and n == list(range(n[0], n[-1] + 1)) else " ".join(map(str, n))
    if value is None:
        return "none"
    if value == [] or value == ():
        return "none"
    if isinstance(value, Mapping):
        return " ".join(f"{k} {v:g}" for k, v in value.items()) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return {"alpha/r": "α/r", "alpha/sqrt(r)": "α/√r"}.get(value, str(value))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A training configuration of text and finite numbers; what they may be is TrainConfig's to say."""
    out = dict(config)
    for key, value in out.items():
        if not isinstance(key, str) or not (value is None or isinstance(value, (bool, int, float, str))):
            raise UserError(f"{key} is {value!r}; settings are numbers or words")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key} is {value!r}; it must be a finite number")
    return out
