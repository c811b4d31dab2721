"""Train: start and stop runs, and show where one stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app import figures
from app.pages import adapt, alive, overlay, owners, words
from app.pages.lab import Lab, title
from app.runs.experiments import working
from app.runs.fits import check_memory, step_tokens
from app.runs.run import Run, RunRequest, describe
from lora_core.errors import UserError
from lora_core.families import TARGETS, guess
from lora_core.spec import INITS

LISTED = 30
COOL = 1.0  # ‖ΔW‖ that the strip's ramp reaches at least, so that it starts cool
# The settings behind "more": (where it is kept, name, words, what it does, choices)
MORE = (
    ("config", "schedule", "schedule", "how the learning rate falls from its peak", ("linear", "cosine", "constant")),
    ("config", "warmup", "warm-up", "share of the steps in which the learning rate rises from 0", ()),
    ("config", "accumulate", "accumulation", "batches whose gradients are added up for one step", ()),
    ("config", "max_tokens", "longest row", "tokens; longer rows are cut", ()),
    ("config", "eval_rows", "held-out rows", "rows that the held-out loss is measured on", ()),
    ("config", "eval_every", "measure every", "steps between measurements; 0 for three times in a run", ()),
    ("config", "weight_decay", "weight decay", "pulls A and B towards 0 at each step", ()),
    ("config", "clip", "clipping", "longest gradient; 0 for no limit", ()),
    ("config", "dtype", "numbers", "of the frozen model; auto: the faster here", ("auto", "float32", "bfloat16")),
    ("spec", "dropout", "dropout", "share of the inputs of A that are left out at random", ()),
    ("spec", "init", "start", "how A and B begin; gaussian is the paper's", INITS),
    ("spec", "train_A", "A is trained", "no: A stays as it was drawn (LoRA-FA)", (True, False)),
    ("config", "lr_ratio", "B's rate over A's", "1 is the paper's; LoRA+ takes about 16", ()),
)  # fmt: skip


def start(lab: Lab, body: Mapping[str, Any]) -> dict[str, Any]:
    """Make a run of the form and put it into the queue."""
    import lora_core as lc

    facts = lab.session.facts(str(body.get("model", "")))
    try:
        spec = lc.LoraSpec.from_dict(body.get("spec") or {})
        config = lc.TrainConfig.from_dict(body.get("config") or {})
        lc.budget(lab.session.shapes[facts["name"]], spec, tokens=1)  # says what does not fit the model
        owners.may_begin(lab.store, config.to_dict())
        choice = body.get("data") or {}
        with lab.session.words:
            task = lab.task({"seed": config.seed, **choice})
        if not task.train:
            raise UserError(f"{task.name} has no rows to train on")
        check_memory(lab.session.shapes[facts["name"]], spec, config, step_tokens(task, config))
        data = str(lab.uploads.path(str(choice["file"]))) if choice.get("file") else None
        request = RunRequest(model=facts["name"], task=None if data else str(choice["task"]), data=data,
                             spec=spec.to_dict(), config=config.to_dict())  # fmt: skip
        run = lab.queue.start(lab.store.create(request, owner=owners.owner()).id)
    except UserError as error:
        return adapt.fault(error)
    return {"run": run.id}


def stop(lab: Lab, body: Mapping[str, Any]) -> dict[str, Any]:
    return {"run": lab.queue.stop(lab.own(body.get("run")).id).id}


def resume(lab: Lab, body: Mapping[str, Any]) -> dict[str, Any]:
    run = lab.own(body.get("run"))
    owners.may_begin(lab.store, run.request.config)
    return {"run": lab.queue.start(run.id).id}


def form(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """A run's settings, for the dials; with the facts of its model if that can be loaded."""
    run = lab.run(query.get("run"))
    try:
        facts, fault = lab.session.facts(run.request.model), None
    except UserError as error:
        facts, fault = None, str(error)
    return {"facts": facts, "fault": fault, "form": adapt.form(lab, run, facts)}


def view(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """A run as it stands; the picture only when it is another than the one that was seen.

    query: run, seen (the version that the page has), over (numbers of the runs behind it; "auto" for the one that
    says most), light (with seen: while it lives the numbers alone, of whatever version)
    """
    run = lab.run(query.get("run"))
    events = lab.store.events(run.id)
    behind = ghosts(lab, run, query.get("over", "auto"))
    version = f"{run.attempts}.{len(events)}.{run.status}." + ",".join(str(r.id) for r in behind)
    last = next((e for e in reversed(events) if e.get("kind") == "step"), {})
    stage = next((e for e in reversed(events) if e.get("kind") in ("status", "step", "base")), {})
    told = stage.get("message") if stage.get("kind") == "status" else None
    answer: dict[str, Any] = {
        "run": run.id,
        "name": title(run),
        "recorded": run.recorded,
        "status": run.status,
        "says": words.status(run, told if run.status != "queued" else waits_for(lab)),
        "step": max(run.step, int(last.get("step", 0))),
        "steps": run.steps,
        "tokens_per_s": last.get("tokens_per_s"),
        "left_s": last.get("left_s") if run.status == "running" else None,
        "took": words.duration(run.result["train_s"]) if run.result.get("train_s") else None,
        "base_loss": run.base_loss,
        "loss": run.loss,
        "score": words.score(run.score),
        "error": run.error,
        "adapter": run.adapter is not None,
        "spec": dict(run.request.spec),
        "config": dict(run.request.config),
        "model": run.request.model,
        "data": run.request.data_name,
        "about": describe(run),
        "live": run.live,
        "can_resume": run.status in ("stopped", "interrupted", "failed") and run.step < run.steps,
        "version": version,
        "behind": [r.id for r in behind],
    }
    if run.status == "running" and answer["step"] and not told:
        answer["says"] = f"run {run.id} is training: step {answer['step']:,} of {run.steps:,}"
    answer["says"] = alive.line(lab, run, answer["says"])
    if query.get("seen") == version:
        return answer
    if query.get("light") and query.get("seen") and run.live:
        del answer["version"]  # the pictures that the page has are older
        return answer
    norms = next((e["norms"] for e in reversed(events) if e.get("norms")), {})
    names = [(("recorded run" if r.recorded else f"run {r.id}"), lab.store.events(r.id)) for r in behind]
    answer["figure"] = figures.loss(events, ghosts=names, revision=str(run.id))
    answer["rows"] = table(events)
    answer["warm"] = warm(norms, [e for _, e in names])
    if run.live:
        trained = figures.smooth(
            [e["loss"] for e in events if e.get("kind") == "step" and figures.finite(e.get("loss"))]
        )
        recent = trained[-1] if trained else None
        answer["sentence"] = words.under_way(answer["step"], run.steps, recent, run.base_loss) if recent else ""
    else:
        answer["sentence"] = words.training(run)
    answer["beside"] = words.beside(run, behind[0], title(behind[0])) if behind else ""
    answer["differs"] = overlay.differs(run, behind) if query.get("over", "auto") != "auto" else None
    return answer


def waits_for(lab: Lab) -> str | None:
    """What a run waits for besides the runs before it."""
    return "an experiment on Questions ends first" if working(lab.store.root.parent) else None


def ghosts(lab: Lab, run: Run, over: str) -> list[Run]:
    """The runs drawn behind: those asked for, or the last comparable one before it, at most four."""
    if over == "auto":
        own = [r for r in lab.runs(LISTED) if r.id < run.id or run.recorded]
        recorded = lab.store.recorded()
        for other in [*own, *([recorded] if recorded and not run.recorded else [])]:
            ended = other.status in ("done", "stopped") and other.loss is not None
            if other.id != run.id and ended and overlay.comparable(run, other) and not run.recorded:
                return [other]
        return []
    ids = dict.fromkeys(int(n) for n in over.split(",") if n.isdigit() and len(n) < 16)
    found = []
    for id in list(ids)[:8]:
        try:
            if id != run.id:
                found.append(lab.run(id))
        except UserError:
            continue
    return found[:4]


def warm(norms: Mapping[str, float], others: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """‖ΔW‖ by matrix and layer, for the strip; `top` is where its ramp ends."""
    theirs = [n for events in others for n in last_norms(events).values()]
    top = max([COOL, *norms.values(), *theirs])
    values = grid(norms)
    return {"values": values, "top": top, "most": max(norms.values(), default=0.0), "say": words.growth(values)}


def last_norms(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return next((dict(e["norms"]) for e in reversed(events) if e.get("norms")), {})


def grid(values: Mapping[str, float]) -> dict[str, list[float | None]]:
    """{matrix: [value of layer 0, 1, …]}, None where nothing is adapted; of all targets before there is a value."""
    found = {k: where(k) for k in values}
    layers = max([layer + 1 for layer, _ in found.values() if layer is not None], default=0)
    names = sorted({t for _, t in found.values()}, key=lambda t: (TARGETS.index(t) if t in TARGETS else 99, t))
    out: dict[str, list[float | None]] = {t: [None] * layers for t in names}
    for key, (layer, target) in found.items():
        if layer is not None:
            out[target][layer] = round(float(values[key]), 4)
    return out


def where(key: str) -> tuple[int | None, str]:
    """(layer, matrix) of a site's key: a module path, with ".q" behind it for a slice of a fused module."""
    path, _, last = key.rpartition(".")
    if last in TARGETS and path:
        return guess(path)[1], last
    target, layer = guess(key)
    return layer, target


def table(events: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The curve as rows, for CSV."""
    rows: list[list[Any]] = [["step", "training loss", "held-out loss", "learning rate", "tokens"]]
    for e in events:
        if e.get("kind") in ("base", "step", "held"):
            trained = e.get("loss") if e["kind"] == "step" else None
            rows.append([0 if e["kind"] == "base" else e.get("step"), trained, e.get("held_loss"), e.get("lr"),
                         e.get("tokens")])  # fmt: skip
    return rows
