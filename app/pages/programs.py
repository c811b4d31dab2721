"""The page's endpoints for programs: what `gradio_client` may call by name. docs/page_api.md describes them.

Each asks the very function that the page asks, as the visitor who calls, and with the same checks of what is given.
"""

# no `from __future__ import annotations`: Gradio reads what a function gives from its signature
import threading
from collections.abc import Callable, Mapping
from contextvars import copy_context
from typing import Any

import gradio as gr
from gradio.events import api

from app.pages import adapt, train
from app.pages.lab import Lab
from app.pages.values import check
from app.pages.visitor import Visitor, asking
from lora_core.errors import UserError

AT_ONCE = 4  # of the same kind
TOLD = ("run", "name", "status", "live", "step", "steps", "base_loss", "loss", "score", "left_s", "says", "sentence",
        "error", "model", "data", "spec", "config")  # fmt: skip
loading = threading.Lock()


def endpoints(lab: Lab) -> None:
    """Add them to the Blocks that are being built."""

    def ask(request: gr.Request, address: str, question: Callable[..., dict[str, Any]], given: Mapping[str, Any],
            method: str = "POST") -> dict[str, Any]:  # fmt: skip
        who: Visitor = request.request.scope["lora_lab.visitor"]  # type: ignore[union-attr]
        context = copy_context()
        context.run(asking.set, who)
        try:
            check(method, address, given)
            answer = context.run(question, lab, given)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        if "error" in answer and "field" in answer:
            raise gr.Error(answer["error"], print_exception=False)
        return answer

    def models(request: gr.Request) -> list[dict[str, Any]]:
        """Models that have a name here: name, parameters, cached (whether loading it needs no network), about."""
        from lora_core.models import registry

        return [{"name": m.name, "parameters": m.parameters, "cached": m.cached, "about": m.about} for m in registry()
                if m.kind == "causal-lm"]  # fmt: skip

    def tasks(request: gr.Request) -> list[dict[str, Any]]:
        """Built-in tasks: name, about."""
        from lora_core.tasks import task_names

        return [{"name": name, "about": about} for name, about in task_names()]

    def budget(model: str, spec: dict[str, Any], config: dict[str, Any], request: gr.Request) -> dict[str, Any]:
        """Parameters, bytes and memory of an adapter before it is trained. spec, config: as LoraSpec and TrainConfig;
        what is left out is as usual."""

        def counted(lab: Lab, given: Mapping[str, Any]) -> dict[str, Any]:
            with loading:  # of many who ask at once, one loads the model
                lab.session.facts(str(given["model"]))
            return adapt.confirm(lab, given)

        return ask(request, "budget", counted, {"model": model, "spec": spec, "config": config})["budget"]

    def start(model: str, task: str, spec: dict[str, Any], config: dict[str, Any], request: gr.Request) -> int:
        """Queue a training on a built-in task; gives the run's number."""
        given = {"model": model, "spec": spec, "config": config, "data": {"task": task}}
        return ask(request, "train", train.start, given)["run"]

    def run(number: int, request: gr.Request) -> dict[str, Any]:
        """A run as it stands: status, live (whether it waits or trains), step of steps, losses in nats a token, what it
        did in one sentence."""
        answer = ask(request, "run", train.view, {"run": str(number)}, "GET")
        return {k: answer.get(k) for k in TOLD}

    def losses(number: int, request: gr.Request) -> list[list[Any]]:
        """A run's curve: a row of names, then one row an event."""
        return ask(request, "run", train.view, {"run": str(number), "over": "none"}, "GET")["rows"]

    def stop(number: int, request: gr.Request) -> int:
        """Take a run out of the queue, or end it after its step with its adapter kept."""
        return ask(request, "stop", train.stop, {"run": number})["run"]

    for function in (models, tasks, budget, start, run, losses, stop):
        api(function, api_name=function.__name__, concurrency_limit=AT_ONCE, concurrency_id="programs")
