"""Adapt: which model, which data, which matrices, what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psutil

from app.pages import help, owners, words
from app.pages.lab import Lab
from app.runs.run import Run, describe
from lora_core.errors import UserError, is_real
from lora_core.models import DEFAULT, registry

TASK = "restaurant"
PREVIEW_ROWS, MOST_TOLD = 8, 32
_told: dict[tuple[Any, ...], tuple[Any, dict[str, Any]]] = {}  # what was said of the built-in tasks, by whose tokens
LINKED = ("model", "task", "file")  # what an address may say of the form, besides s.… and c.…
# a name of a setting, as error messages begin -> the control that it belongs to
FIELDS = ("rank", "alpha", "layers", "steps", "batch_size", "lr", "seed", "accumulate", "max_tokens", "eval_rows",
          "warmup", "weight_decay", "clip", "dropout", "lr_ratio")  # fmt: skip


def boot(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """Everything that the page needs to draw itself: models, tasks, the run that the address names, its settings."""
    from lora_core.methods import DORA, METHODS
    from lora_core.tasks import task_names

    note, run = None, None
    if "run" in query:
        try:
            run = lab.run(query["run"])
        except UserError as error:
            note = str(error)
    asked = run is not None
    run = run or lab.newest()
    own = run is not None and (asked or not run.recorded)
    there = lab.session.loaded
    default = owners.usual(DEFAULT, there and there.name)
    usual = owners.usual(run.request.model if run is not None and own else DEFAULT, there and there.name)
    name = query.get("model") or usual
    facts, fault = None, None
    try:
        facts = lab.session.facts(name, quick=True)
    except UserError as error:
        fault = str(error)
        if name != default:
            with suppress(UserError):
                facts = lab.session.facts(default, quick=True)
    models = [{"name": m.name, "parameters": m.parameters, "cached": m.cached, "source": m.source, "about": m.about}
              for m in registry() if m.kind == "causal-lm"]  # fmt: skip
    base = form(lab, run if own else None, facts)
    # an address that has a form but no run was written where none was open: it means the usual settings
    linked = not asked and any(k in LINKED or k.startswith(("s.", "c.")) for k in query)
    return {
        "models": models,
        "tasks": [{"name": n, "about": about} for n, about in task_names()],
        "memory": psutil.virtual_memory().available,
        "glossary": words.GLOSSARY,
        "methods": [{k: getattr(m, k) for k in ("name", "title", "about", "size", "usual", "lr")} for m in (
            METHODS["lora"], DORA, *(m for m in METHODS.values() if m.name != "lora"))],
        "help": help.HELP,
        "facts": facts,
        "fault": fault,
        "note": note,
        "form": form(lab, None, facts) if linked else base,
        "base": base,
        "usual": usual,
        "run": run.id if run is not None else None,
        "recorded": lab.store.recorded() is not None,
    }


def form(lab: Lab, run: Run | None, facts: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the dials show: the settings of a run, or the defaults."""
    spec = dict(facts["spec"]) if facts else {}
    config = dict(facts["config"]) if facts else {}
    data: dict[str, Any] = {"task": TASK}
    if run is not None:
        spec |= run.request.spec
        config |= run.request.config
        data = {"task": run.request.task} if run.request.task else {}
        if run.request.task is None:
            with suppress(UserError, OSError):
                if kept := lab.data_of(run):
                    data = {"file": kept[0], "name": kept[1]}
            data = data or {"task": TASK}
    return {"spec": spec, "config": config, "data": data, "says": describe(run) if run is not None else None}


def model(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """The facts of a model that was picked; it is loaded, and fetched first where that is needed."""
    return lab.session.facts(query.get("name", ""))


def data(lab: Lab, query: Mapping[str, Any]) -> dict[str, Any]:
    """What is trained on: the task in words, how long its rows are, some of them as the model sees them."""
    from lora_core.evaluate import spread
    from lora_core.tasks import encode_many, preview

    facts = lab.session.facts(str(query.get("model", "")))
    tokenizer = lab.session.tokenizers.get(facts["name"])
    if tokenizer is None:  # the facts are those of the last start
        lab.session.load(facts["name"])
        tokenizer = lab.session.tokenizers[facts["name"]]
    most = whole(query.get("max_tokens"), facts["config"]["max_tokens"])
    with lab.session.words:
        choice = {**query, "seed": whole(query.get("seed"), 0), "max_tokens": most}
        key = (id(lab), facts["name"], choice.get("task"), choice["seed"], most)
        kept = _told.get(key) if not choice.get("file") else None
        if kept is not None and kept[0] is tokenizer:  # everybody in a room asks for the same tasks
            return kept[1]
        task = lab.task(choice, tokenizer)
        items = encode_many(tokenizer, spread(task.train, 256), task.template, most)
        rows = preview(task, tokenizer, PREVIEW_ROWS, most)
    n = max(1, len(items))
    answer = {
        "name": task.name,
        "about": task.about,
        "template": task.template,
        "train_rows": len(task.train),
        "held_rows": len(task.test),
        "score": task.score_name,
        "notes": list(task.notes),
        "tokens": sum(len(e.ids) for e in items) / n,
        "labelled": sum(len(e.ids) - e.start for e in items) / n,
        "rows": rows,
        "cut": sum(e.cut for e in items),
        "max_tokens": most,
    }
    if not choice.get("file"):
        _told[key] = (tokenizer, answer)
        while len(_told) > MOST_TOLD:
            _told.pop(next(iter(_told)), None)
    return answer


def confirm(lab: Lab, body: Mapping[str, Any]) -> dict[str, Any]:
    """Python's word on the dials: the budget and the time, or what is wrong with which control."""
    facts = lab.session.facts(str(body.get("model", "")), quick=True)
    answer: dict[str, Any] = {"seq": body.get("seq")}
    shapes = lab.session.shapes.get(facts["name"])
    if shapes is None:  # still loading: the page's own answer stands until then
        return answer
    import lora_core as lc

    try:
        spec = lc.LoraSpec.from_dict(body.get("spec") or {})
        config = lc.TrainConfig.from_dict(body.get("config") or {})
        rows = config.batch_size * config.accumulate
        tokens, labelled = (round(rows * number(body.get(k), 64.0)) for k in ("tokens", "labelled"))
        answer["budget"] = lc.budget(shapes, spec, tokens=tokens, labelled=labelled).to_dict()
        answer["spec"] = spec.to_dict()
    except UserError as error:
        return answer | fault(error)
    if body.get("data"):
        with lab.session.free_model(facts["name"]) as loaded:
            if loaded is not None:
                from lora_core.estimate import estimate

                answer["s_per_flop"] = lab.session.speed()  # every run teaches the next estimate
                with suppress(UserError), lab.session.words:
                    task = lab.task({"seed": config.seed, **body["data"]})
                    answer["time"] = estimate(loaded.model, spec, task, config, loaded.tokenizer).to_dict()
    return answer


def fault(error: UserError) -> dict[str, str]:
    """{"error", "field"}: the control that caused it, by the word that the message begins with."""
    text = str(error)
    first = text.split(maxsplit=1)[0] if text else ""
    field = first if first in FIELDS else ""
    if text.startswith(("no target", "no matrix", "target ", "targets ")):
        field = "targets"
    if text.startswith(("no layer", "layer ")):
        field = "layers"
    if text.startswith(("no scaling",)):
        field = "alpha"
    if text.startswith(("no task", "no file", "that file", "choose a task")):
        field = "task"
    if text.startswith(("no model", "model ")):
        field = "model"
    return {"error": text, "field": field}


def whole(value: Any, default: int) -> int:
    """A whole number that came as text or JSON, or the default."""
    try:
        return int(value) if value not in (None, "") and not isinstance(value, bool) else default
    except (ValueError, OverflowError):
        return default


def number(value: Any, default: float) -> float:
    """A finite positive number out of JSON, or the default."""
    return float(value) if is_real(value, 0, 1e9) and value else default
