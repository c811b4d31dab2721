"""Train's Step and Slow: one real step at a time on the server's model, in stages, with an adapter of its own."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from app import figures
from app.pages import adapt, owners
from app.pages.film import address, named, titled
from app.pages.lab import Lab, task_of_run
from app.pages.train import grid
from lora_core.errors import UserError

if TYPE_CHECKING:
    from lora_core.walk import Forward, Stepped, Walk

WALKS = 4  # of different pages that are remembered
SHOWN, LONGEST = 1, 90  # rows of a step, and tokens of each, that are shown
OTHER = (
    "Step and Slow walk the training on completions, token by token; pairs of answers and labels are trained by the "
    "Train button alone"
)
_walks: OrderedDict[str, Walk] = OrderedDict()
_lock = threading.Lock()


def walk(lab: Lab, body: Mapping[str, Any]) -> dict[str, Any]:
    """One stage of a walk: "forward" of the next step, or "finish" (gradient, Adam and the new ΔW, all of one pass).

    body: page (who walks), stage, step (its number; 1 begins anew), m (the chosen matrix), and what is walked: run, or
    model, spec, config and data as for "train"
    """
    page, step = owners.page(body.get("page")), adapt.whole(body.get("step"), 1)
    stage = body.get("stage")
    if stage not in ("forward", "finish"):
        raise UserError(f"stage is {stage!r}; a step has the stages forward and finish")
    name, told = what(lab, body)
    with lab.session.model(name) as loaded:
        with _lock:
            found = None if stage == "forward" and step == 1 else _walks.get(page)
        if found is not None and (found.model is not loaded.model or found.step != step - 1):
            raise UserError("this walk is over: another model was loaded since; begin again with step 1")
        if found is None:
            if stage != "forward" or step != 1:
                raise UserError("this walk is over; begin again with step 1")
            found = begun(lab, body, loaded)
            with _lock:
                _walks[page] = found
                _walks.move_to_end(page)
                while len(_walks) > WALKS:
                    _walks.popitem(last=False)
        if stage == "forward":
            return {"step": step, "forward": read(found.forward(), told.get(step))}
        return {"step": step, "steps": found.config.steps, **moved(found.finish(), str(body.get("m") or ""))}


def what(lab: Lab, body: Mapping[str, Any]) -> tuple[str, dict[int, float]]:
    """(the model's name, {step: the training loss that the run told}) of what is walked."""
    if body.get("run") is None:
        return lab.session.facts(str(body.get("model", "")))["name"], {}
    run = lab.run(body["run"])
    losses = {e["step"]: e["loss"] for e in lab.store.events(run.id)
              if e.get("kind") == "step" and figures.finite(e.get("loss"))}  # fmt: skip
    return run.request.model, losses


def begun(lab: Lab, body: Mapping[str, Any], loaded: Any) -> Walk:
    """A fresh walk of a run's settings, or of the form's."""
    import lora_core as lc
    from lora_core.objective import choose
    from lora_core.walk import Walk

    if body.get("run") is not None:
        run = lab.run(body["run"])
        if run.result.get("objective", "lm") != "lm":
            raise UserError(OTHER)
        spec, config = run.request.spec, run.request.config
        with lab.session.words:
            task = task_of_run(run, loaded.tokenizer)
    else:
        spec, config = body.get("spec") or {}, body.get("config") or {}
        with lab.session.words:
            task = lab.task({"seed": config.get("seed", 0), **(body.get("data") or {})}, loaded.tokenizer)
    if choose(False, task.train) != "lm":
        raise UserError(OTHER)
    given = lc.LoraSpec.from_dict(spec), lc.TrainConfig.from_dict(config)
    owners.modest(given[1].to_dict())
    return Walk(loaded.model, loaded.tokenizer, task, *given)


def end(lab: Lab, body: Mapping[str, Any]) -> dict[str, Any]:
    """Forget a page's walk; nothing of it was left on the model."""
    with _lock:
        return {"ended": _walks.pop(owners.page(body.get("page")), None) is not None}


def read(f: Forward, told: float | None) -> dict[str, Any]:
    """Stage 1 in words and numbers. told: what the run itself said of this step."""
    most = max(((loss, text) for row in f.texts for text, loss in row if loss is not None), default=(0.0, ""))
    word = most[1].strip() or most[1]
    say = (f"{f.rows} rows went through the model. At the {f.labelled} tokens of their completions its surprise is "
           f"{f.loss:.2f} nats on average; the largest is {most[0]:.1f}, at “{word}”.")  # fmt: skip
    beside = "" if told is None else f"The run itself had {told:.2f} at this step."
    texts = [[[t, None if loss is None else round(loss, 3)] for t, loss in row[:LONGEST]] for row in f.texts[:SHOWN]]
    return {"loss": f.loss, "say": say, "beside": beside, "texts": texts}


def moved(s: Stepped, m: str) -> dict[str, Any]:
    """Stages 2 to 4 of the chosen matrix, or of the one that moved most where that one is not adapted."""
    key = named(s.matrices, m) or max(s.matrices, key=lambda k: s.matrices[k].norm_after)
    x = s.matrices[key]
    gradient = f"B has left 0, so both have a gradient: ‖∂L/∂A‖ = {size(x.grad_A)}, ‖∂L/∂B‖ = {size(x.grad_B)}."
    if x.grad_A == 0 and x.norm_before == 0:
        gradient = ("B is 0, so ∂L/∂A = s·Bᵀ·(∂L/∂h)·xᵀ is 0 too: only B learns in this step, "
                    f"‖∂L/∂B‖ = {size(x.grad_B)}.")  # fmt: skip
    clipped = "nothing is clipped" if s.clipped == 1 else f"clipping shortens them to {s.clipped:.0%} of that"
    gradient += f" All gradients together are {size(s.grad_norm)} long; {clipped}."
    adam = (f"Adam moves an entry by about the rate, {size(s.lr)}, whatever the size of its gradient: an entry of B by "
            f"{size(x.entry_B)} on average, of A by {size(x.entry_A)}.")  # fmt: skip
    new = (f"‖ΔW‖ went from {size(x.norm_before)} to {size(x.norm_after)}, and the loss of these rows from "
           f"{s.loss:.3f} to {s.loss_after:.3f}.")  # fmt: skip
    return {
        "m": address(key), "title": titled(key), "lr": s.lr, "loss": s.loss, "loss_after": s.loss_after,
        "gradient": {"A": x.grad_A, "B": x.grad_B, "say": gradient,
                     "map": grid({k: v.grad_B for k, v in s.matrices.items()})},
        "adam": {"A": x.step_A, "B": x.step_B, "say": adam},
        "delta": {"before": list(x.before), "after": list(x.after), "say": new,
                  "norms": [x.norm_before, x.norm_after]},
    }  # fmt: skip


def size(x: float) -> str:
    """Two digits of a number that may be tiny."""
    return f"{x:.2g}"
