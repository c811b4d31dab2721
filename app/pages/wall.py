"""The wall: what a room has guessed and found, for all to see after Reveal; the presenter sees what is run before."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from app import figures_room
from app.pages import words
from app.pages.lab import Lab
from app.pages.overlay import front
from app.pages.room import OpenRoom, called, opened
from app.pages.take import attached
from app.pages.visitor import asking
from app.room.export import notebook
from app.room.grid import set_name
from app.room.question import Question
from app.room.room import CURVES, SHOWN, STAGES, Person, counted
from app.tables import as_csv
from lora_core.errors import UserError

AXIS = {"noise": "loss on new inputs", "swap": "‖W − W0‖ / ‖W0‖"}  # what a preset's curve is of, where not the loss
LOG = ("scale", "full")  # presets that Play draws on a logarithmic axis
HEAD = ("round", "question", "person", "what", "answer", "right answer", "rank", "matrices", "task", "steps", "seed",
        "parameters", "base loss", "loss", "seconds", "run")  # fmt: skip


def wall(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """{"wall": None} where there is nothing to show (yet), else bars, curves and runs with their figures."""
    open_room = opened(lab)
    room, stage = open_room.room, open_room.room.stage
    question, round = room.question, room.round
    shown = stage in SHOWN
    if question is None or round is None or not shown and not (asking.get().sees_all and stage == "run"):
        return {"wall": None, "version": room.version}
    found: dict[str, Any] = {"question": question.text, "stage": stage}
    if shown:
        found["guesses"] = guesses(question, room.guesses(round))
        if question.kind == "card":
            found["answer"] = answer(question.name)
    if question.act == "play":
        found["play"] = play(open_room, round, question.name)
    if question.act == "grid":
        found["runs"] = runs(open_room, round, question, shown)
    return {"wall": found, "version": room.version}


def guesses(question: Question, given: Mapping[str, int]) -> dict[str, Any]:
    """Bars and their sentence."""
    counts = counted(question, given)
    return {"choices": list(question.choices), "counts": counts, "right": question.right,
            "card": question.kind == "card", "say": say_guesses(question, counts)}  # fmt: skip


def say_guesses(question: Question, counts: Sequence[int]) -> str:
    total = sum(counts)
    if not total:
        return "Nobody has guessed."
    if question.right is None:
        most = max(counts)
        first = [c for c, n in zip(question.choices, counts, strict=True) if n == most]
        lead = f"most chose “{first[0].rstrip('.')}”" if len(first) == 1 else "there is no favourite"
        return f"{words.plural(total, 'guess', 'guesses').capitalize()}: {lead}."
    n = counts[question.right]
    what = "the paper's claim" if question.kind == "card" else "the right answer"
    return f"{n} of {total} chose {what}, “{question.choices[question.right].rstrip('.')}”."


def answer(name: str) -> dict[str, Any] | None:
    """What was measured of a card, in its recorded result; None where nothing is stored."""
    from lora_core.experiments import find_experiment, stored_result

    e, stored = find_experiment(name), stored_result(name)
    return {"name": e.name, "claim": e.claim, "verdict": stored.verdict if stored else None,
            "sentence": stored.sentence if stored else None}  # fmt: skip


def play(open_room: OpenRoom, round: int, preset: str) -> dict[str, Any] | None:
    """Up to thirty curves, their spread and the median; None while there is none."""
    room = open_room.room
    found = room.curves(round)
    if not found:
        return None
    people, steps = room.people(), max(c.steps for c in found)
    drawn = [c for c in found if c.steps == steps][:CURVES]
    losses = [c.loss for c in drawn]
    every = [c.loss for c in found if c.steps == steps]
    what = AXIS.get(preset, "loss")
    say = figures_room.say_curves(every, steps, what)
    figure = figures_room.curves(losses, steps, [called(people, c.owner) for c in drawn], what=what, log=preset in LOG)
    return {"count": len(every), "say": say + (f" Drawn are {len(drawn)}." if len(drawn) < len(every) else ""),
            "figure": figure}  # fmt: skip


def runs(open_room: OpenRoom, round: int, question: Question, shown: bool) -> dict[str, Any]:
    """Who ran which cell and what came of it, with the three figures."""
    room, cells = open_room.room, open_room.cells
    people = room.people()
    given = room.guesses(round) if shown else {}
    rows, ended, base = [], [], None
    for c in cells.all(round):
        if c.status == "cancelled":
            continue
        run = cells.run_of(c)
        guessed = given.get(c.owner)
        row = {"who": called(people, c.owner), "says": c.plan.says, "rank": c.plan.rank,
               "set": set_name(c.plan.targets), "seed": c.plan.seed, "status": c.status, "run": run.id if run else None,
               "guess": "ABCDE"[guessed] if guessed is not None else None, "loss": None,
               "trainable": None, "train_s": None}  # fmt: skip
        if run is not None:
            base = run.base_loss if run.base_loss is not None else base
            row |= {"loss": run.loss if run.step else None, "trainable": run.result.get("trainable"),
                    "train_s": run.result.get("train_s"), "step": run.step, "steps": run.steps}  # fmt: skip
            if c.status == "done" and run.loss is not None and row["trainable"]:
                ended.append(row)
        rows.append(row)
    answer: dict[str, Any] = {"rows": rows, "base": base, "pareto": None, "losses": None, "spectra": None}
    if not ended:
        waiting = sum(r["status"] in ("waiting", "started") for r in rows)
        answer["say"] = f"{words.plural(waiting, 'run').capitalize()} under way; each will be a point here."
        return answer
    answer["pareto"] = figures_room.pareto(ended, front(ended), base)
    answer["say"], answer["front"] = say_runs(ended), front(ended)
    drawn = [r | {"curve": figures_room.smoothed(events), "sigma": largest(events)} for r in ended
             if (events := cells.store.events(r["run"]))]  # fmt: skip
    answer["losses"] = figures_room.losses([r for r in drawn if r["curve"]], base)
    filmed = [r for r in drawn if r["sigma"]]
    answer["spectra"] = figures_room.spectra(filmed) if filmed else None
    answer["say_spectra"] = figures_room.say_spectra(filmed)
    answer["say_losses"] = say_losses(ended, base)
    return answer


def say_runs(ended: Sequence[Mapping[str, Any]]) -> str:
    """The best and the fastest."""
    best = min(ended, key=lambda r: (r["loss"], r["trainable"]))
    timed = [r for r in ended if r["train_s"]]
    text = f"Best: {best['says']} ({best['who']}), loss {best['loss']:.2f} with {best['trainable']:,} parameters."
    if timed:
        fast = min(timed, key=lambda r: r["train_s"])
        text += f" Fastest: {fast['says']} ({fast['who']}), {words.duration(fast['train_s'])}."
    return text


def say_losses(ended: Sequence[Mapping[str, Any]], base: float | None) -> str:
    low, high = min(r["loss"] for r in ended), max(r["loss"] for r in ended)
    start = f"from {base:.2f} " if base is not None else ""
    if len(ended) == 1:
        return f"The held-out loss went {start}to {low:.2f}."
    return f"The held-out loss went {start}to between {low:.2f} and {high:.2f} in {len(ended)} runs."


def largest(events: Sequence[Mapping[str, Any]]) -> list[float]:
    """The singular values of the ΔW that grew most, at the end; none where no spectrum was kept."""
    last = next((e["sigma"] for e in reversed(events) if e.get("sigma")), {})
    found = max(last.values(), key=lambda s: s[0] if s else 0.0, default=[])
    return [float(s) for s in found] if found and found[0] > 0 else []


# ---- to take along
def table(lab: Lab) -> list[list[Any]]:
    """Every guess, curve and run of all rounds, a row each; UserError for a participant before Reveal."""
    open_room = opened(lab)
    room, cells = open_room.room, open_room.cells
    if not asking.get().sees_all and room.stage not in SHOWN:
        raise UserError("the wall can be taken along after Reveal")
    people: Mapping[str, Person] = room.people()
    rows: list[list[Any]] = [list(HEAD)]
    hidden = room.round if STAGES.index(room.stage) < STAGES.index("reveal") else None
    for number, question in room.rounds():
        head = [number, question.text]
        right = question.choices[question.right] if question.right is not None else None
        if number != hidden:
            for owner, choice in room.guesses(number).items():
                rows.append([*head, called(people, owner), "guess", question.choices[choice], right, *[None] * 10])
        for c in room.curves(number):
            rows.append([*head, called(people, c.owner), "play", None, None, None, None, question.name, c.steps, c.seed,
                         None, 1.0, c.loss[-1], None, None])  # fmt: skip
        for c in cells.all(number):
            run = cells.run_of(c)
            if c.status == "cancelled" or run is None:
                continue
            rows.append([*head, called(people, c.owner), c.status, None, None, c.plan.rank, set_name(c.plan.targets),
                         c.plan.task, run.step, c.plan.seed, run.result.get("trainable"), run.base_loss, run.loss,
                         run.result.get("train_s"), run.id])  # fmt: skip
    return rows


def rounds(lab: Lab) -> list[dict[str, Any]]:
    """Every round that was revealed, as the notebook takes it."""
    open_room = opened(lab)
    room = open_room.room
    hidden = None if room.stage in SHOWN else room.round
    found = []
    for number, question in room.rounds():
        if number == hidden:
            continue
        bars = guesses(question, room.guesses(number))
        played = play(open_room, number, question.name) if question.act == "play" else None
        ran = runs(open_room, number, question, True) if question.act == "grid" else None
        found.append({"question": question.text, **bars, "play": played, "runs": ran})
    return found


def csv_file(lab: Lab) -> Response:
    return attached(as_csv(table(lab)).encode(), "room.csv", "text/csv; charset=utf-8")


def notebook_file(lab: Lab) -> Response:
    made = notebook(finite(table(lab)), finite(rounds(lab)))
    return attached(json.dumps(made, indent=1).encode(), "room.ipynb", "application/x-ipynb+json")


def routes(lab: Lab) -> list[Route]:
    """The files, below lab/api; none without a room."""
    files = {"room.csv": csv_file, "room.ipynb": notebook_file} if lab.room is not None else {}
    return [Route(f"/lab/api/{name}", giving(lab, f), methods=["GET"]) for name, f in files.items()]


def giving(lab: Lab, file: Callable[[Lab], Response]) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        try:
            return await run_in_threadpool(file, lab)
        except UserError as error:
            return JSONResponse({"error": str(error), "field": ""}, 404)

    return endpoint


def finite(value: Any) -> Any:
    """The same with None for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, (list, tuple)) else value
