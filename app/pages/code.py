"""As code: the exact form as a command, as lines of Python and as a notebook, each of which makes the same adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from app.pages.lab import Lab
from app.runs.run import RunRequest, command_line, describe
from lora_core.errors import UserError

OUT = "my-adapter"
KEPT = ("steps", "batch_size", "lr", "seed")  # settings that are written even where they are as usual
APART = ("norms_every", "checkpoint_every")  # what is looked at and kept on the way; it changes no adapter


def written(lab: Lab, body: Mapping[str, Any]) -> dict[str, Any]:
    """{"command", "python", "notebook", "note"} of a form: model, spec, config, data. Errors as for a training."""
    import lora_core as lc

    spec = lc.LoraSpec.from_dict(body.get("spec") or {})
    config = lc.TrainConfig.from_dict(body.get("config") or {})
    choice = body.get("data") or {}
    own = lab.uploads.path(str(choice["file"])).name if choice.get("file") else None
    if own is None and not choice.get("task"):
        raise UserError("choose a task, or a file of your own")
    if spec.rank_pattern or spec.alpha_pattern:
        raise UserError("ranks by matrix have no option on the command line; write them in Python: LoraSpec's "
                        "rank_pattern")  # fmt: skip
    request = RunRequest(model=str(body.get("model", "")), task=None if own else str(choice["task"]), data=own,
                         spec=spec.to_dict(), config=config.to_dict())  # fmt: skip
    return {
        "command": command_line(request, OUT),
        "python": python(request, spec, config),
        "notebook": notebook(request, spec, config),
        "note": f"It reads {own} from the folder that it is run in." if own else "",
    }


def python(request: RunRequest, spec: Any, config: Any) -> str:
    """The lines that train and save the same adapter."""
    head, task, rest = lines(request, spec, config)
    return "\n".join(["import lora_core as lc", "", *head, *task, *rest, ""])


def lines(request: RunRequest, spec: Any, config: Any) -> tuple[list[str], list[str], list[str]]:
    """(loading, what is trained on, training and saving)."""
    load = {k: getattr(config, k) for k in ("dtype", "device") if getattr(config, k) != "auto"}
    head = [f"model, tokenizer = lc.load_model({arguments(request.model, **load)})"]
    if request.data is not None:
        more = f"seed={config.seed}, tokenizer=tokenizer, max_tokens={config.max_tokens}"
        task = [f"task = lc.load_data({request.data!r}, {more})"]
    else:
        task = [f"task = lc.load_task({arguments(request.task, seed=config.seed)})"]
    rest = [
        f"spec = lc.LoraSpec({arguments(**changed(spec, ('targets', 'rank', 'alpha')))})",
        f"config = lc.TrainConfig({arguments(**changed(config, KEPT, APART))})",
        "adapter = lc.attach(model, spec, name='mine', seed=config.seed)  # the outputs are still the same",
        "for event in lc.train(adapter, task, config, tokenizer=tokenizer):",
        "    print(event.kind, event.step, event.loss)",
        f"adapter.save({OUT!r})  # PEFT's format",
    ]
    return head, task, rest


def changed(given: Any, always: Sequence[str], never: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a frozen dataclass that are not as usual, and those that are always written."""
    usual = type(given)()
    found = {f.name: getattr(given, f.name) for f in fields(given)}
    return {k: v for k, v in found.items() if k in always or k not in never and v != getattr(usual, k)}


def arguments(*first: Any, **named: Any) -> str:
    return ", ".join([repr(v) for v in first] + [f"{k}={short(v)}" for k, v in named.items()])


def short(value: Any) -> str:
    """A value as it is written in Python; neighbouring layers as a range."""
    if isinstance(value, tuple) and len(value) > 2 and all(isinstance(v, int) for v in value):
        whole = range(min(value), max(value) + 1)
        return repr(whole if value == tuple(whole) else value)
    return repr(value)


def notebook(request: RunRequest, spec: Any, config: Any) -> dict[str, Any]:
    """The same as a notebook (nbformat 4.5): load, look, train, look again, keep, look inside."""
    head, task, rest = lines(request, spec, config)
    look = ["prompts = [lc.tasks.prompt_text(tokenizer, row, task.template) for row in task.test[:3]]"]
    texts = ["*_, last = lc.generate(model, tokenizer, prompts, {sides}, max_new_tokens=48)", "for row, texts in "
             "zip(task.test, last.texts):", "    print(row.prompt, *texts, sep='\\n  ')"]  # fmt: skip
    before = [*look, *(t.format(sides="[None]") for t in texts)]
    after = [t.format(sides="[None, 'mine']") for t in texts]
    where = "all layers" if spec.layers == "all" else f"{len(spec.layers)} layers"
    factors = set(spec.targets) - {"bias", "norm"}
    what = (f"{' '.join(spec.targets)} in {where}, rank {spec.rank}, α {spec.alpha:g}: h = W0·x + s·B·A·x with "
            f"s = {spec.scale():g}" if factors else describe(request))  # fmt: skip
    cells = [
        ("markdown", [f"# {'LoRA' if factors else 'Fine-tuning'} on {request.data_name}", "",
                      f"`{request.model}`, {what}."]),
        ("code", ["import lora_core as lc", "", *head, *task]),
        ("markdown", ["What the model writes before."]),
        ("code", before),
        ("markdown", ["Training: only A and B change, and B starts at zero." if factors else "Training."]),
        ("code", rest),
        ("markdown", ["What it writes without the adapter and with it."]),
        ("code", after),
    ]  # fmt: skip
    if factors:
        cells += [("markdown", ["How strongly each ΔW acts, and along how many directions."]),
                  ("code", ["found = lc.spectra(adapter)",
                            "[(s.path, s.norm, s.stable_rank) for s in found.values()]"])]  # fmt: skip
    return {"nbformat": 4, "nbformat_minor": 5, "cells": [cell(i, *c) for i, c in enumerate(cells)], "metadata": {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"}}}  # fmt: skip


def cell(number: int, kind: str, text: Sequence[str]) -> dict[str, Any]:
    made: dict[str, Any] = {"id": f"cell-{number}", "cell_type": kind, "metadata": {}, "source": "\n".join(text)}
    return made | ({"execution_count": None, "outputs": []} if kind == "code" else {})
