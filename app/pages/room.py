"""The room's addresses: where it stands, for whoever asks; what people do; what the presenter does.

What somebody may not know yet is not sent: guesses of others before Reveal, to nobody; results of others before it, to
no participant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.pages.lab import Lab
from app.pages.visitor import asking
from app.room.cells import Cells, Standing
from app.room.grid import Cell, Grid, dealt, parsed, set_name, unit
from app.room.qr import blocks, code
from app.room.question import asked
from app.room.room import SHOWN, Person, Room, counted
from app.runs.store import RunStore
from lora_core.errors import UserError
from lora_core.models import DEFAULT


@dataclass(frozen=True, kw_only=True)
class OpenRoom:
    """The room of this server. model: what its grids train; participants: the link that lets people in."""

    cells: Cells
    model: str = DEFAULT
    participants: str = ""

    @property
    def room(self) -> Room:
        return self.cells.room


def open_room(store: RunStore, *, model: str = DEFAULT, participants: str = "", minutes: float | None = None
              ) -> OpenRoom:  # fmt: skip
    """The room of LoRA Lab's folder, as it was left. minutes: the budget of training of a round."""
    room = Room(store.root.parent)
    if minutes is not None:
        room.budget(minutes)
    return OpenRoom(cells=Cells(room, store), model=model, participants=participants)


def invitation(open_room: OpenRoom | None, here: bool) -> str:
    """What the terminal says of a room: the participants' link with its code, and how to let others in."""
    if open_room is None:
        return ""
    lines = ["That is the presenter's link. Participants come in by", f"    {open_room.participants}"]
    if here:
        return "\n".join([*lines, "Only this machine reaches it: let others in with --host and this machine's address "
                                  "in your network, such as --host 192.168.1.7"])  # fmt: skip
    return "\n".join([*lines, blocks(open_room.participants)])


def opened(lab: Lab) -> OpenRoom:
    if lab.room is None:
        raise UserError("there is no room here; `lora-lab serve --room` opens one")
    return lab.room


def mine() -> str:
    """The participant who asks. UserError for the presenter, who asks and does not guess."""
    visitor = asking.get()
    if visitor.sees_all:
        raise UserError("the presenter asks; the participants' link is for guessing")
    return visitor.owner


def presenting(lab: Lab) -> OpenRoom:
    if not asking.get().sees_all:
        raise UserError("only the presenter can do that")
    return opened(lab)


# ---- where it stands
def view(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """{"room": None} without a room; how it stands; only the version where that is the one that was seen."""
    if lab.room is None:
        return {"room": None}
    room, visitor = lab.room.room, asking.get()
    me = None if visitor.sees_all else room.arrive(visitor.owner)
    head = {"version": room.version, "here": room.here()}
    if query.get("seen") == head["version"]:
        return {"room": head}
    return {"room": head | stood(lab.room, me)}


def stood(open_room: OpenRoom, me: Person | None) -> dict[str, Any]:
    room = open_room.room
    stage, round, question = room.stage, room.round, room.question
    answer: dict[str, Any] = {"role": "participant" if me else "presenter", "stage": stage, "round": round,
                              "people": len(room.people())}  # fmt: skip
    if me:
        answer |= {"number": me.number, "name": me.name, "seed": me.number % 100}
    else:
        link = open_room.participants
        answer |= {"link": link, "qr": code(link) if link else None, "minutes": room.minutes}
    answer["question"] = None
    if question is not None and round is not None:
        guesses = room.guesses(round)
        answer["question"] = {"kind": question.kind, "text": question.text, "choices": list(question.choices),
                              "name": question.name, "act": question.act}  # fmt: skip
        answer["guessed"] = len(guesses)
        answer["curves"] = len(room.curves(round)) if question.act == "play" else 0
        if me:
            answer["guess"] = guesses.get(me.owner)
        if stage in SHOWN:
            answer["bars"], answer["right"] = counted(question, guesses), question.right
        left = me is not None and any(c.owner == me.owner for c in open_room.cells.standing().earlier)
        if me and (question.act == "grid" or left) and stage != "predict":
            answer["grid"] = grid(open_room, me, stage in SHOWN)
    if me is None:  # who may set it before a question needs it
        answer["grid"] = grid(open_room, None, True)
    return answer


def grid(open_room: OpenRoom, me: Person | None, shown: bool) -> dict[str, Any] | None:
    """The grid and what became of its cells, as far as this person may know; None before there is one."""
    cells, room = open_room.cells, open_room.room
    known = cells.grid()
    if known is None:
        return None
    plan, estimates = known
    standing, people = cells.standing(), room.people()
    taken = standing.cells
    hand = dealt(me.number, plan) if me else None
    places = [{"rank": r, "set": set_name(t), "estimate_s": estimates[i], "dealt": i == hand,
               "taken": sum((c.plan.rank, c.plan.targets) == (r, t) and c.status != "cancelled" for c in taken)}
              for i, (r, t) in enumerate(plan.places)]  # fmt: skip
    return {
        "places": places,
        "task": plan.task,
        "steps": plan.steps,
        "ranks": list(plan.ranks),
        "targets": ["all" if set_name(t) == "all" else list(t) for t in plan.targets],
        "teams": plan.teams,
        "team": unit(me.number, plan.teams) + 1 if me and plan.teams else None,
        "each_s": round(standing.each_s, 1),
        "minutes": room.minutes,
        "spent_min": round(standing.spent_s / 60, 2),
        "cells": [said(standing, c, people, me, shown) for c in taken if c.status != "cancelled"] + [
            said(standing, c, people, me, shown) | {"earlier": True} for c in standing.earlier],
    }


def said(standing: Standing, c: Cell, people: Mapping[str, Person], me: Person | None, shown: bool) -> dict[str, Any]:
    """One cell: whose it is and how it stands; its loss only where it is one's own, or all are shown."""
    own = me is not None and c.owner == me.owner
    d: dict[str, Any] = {"id": c.id, "says": c.plan.says, "seed": c.plan.seed, "status": c.status, "mine": own,
                         "who": called(people, c.owner)}  # fmt: skip
    if c.id in standing.queue:
        position, starts_s = standing.queue[c.id]
        d |= {"position": position, "starts_s": round(starts_s)}
    run = standing.runs.get(c.id)
    if run is not None:
        d |= {"step": run.step, "steps": run.steps, "run_status": run.status}
        if own or shown:
            d |= {"run": run.id, "loss": run.loss if run.step else None, "error": run.error}
    return d


def called(people: Mapping[str, Person], owner: str) -> str:
    return people[owner].called if owner in people else "the presenter"


def tasks(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """The tasks that a grid can have."""
    from lora_core.tasks import task_names

    return {"tasks": [name for name, _ in task_names()]}


# ---- what people do
def name(lab: Lab, body: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": opened(lab).room.rename(mine(), body.get("name")).name}


def guess(lab: Lab, body: Mapping[str, Any]) -> dict[str, Any]:
    opened(lab).room.guess(mine(), body.get("round"), body.get("choice"))
    return {"guess": body.get("choice")}


def curve(lab: Lab, body: Mapping[str, Any]) -> dict[str, Any]:
    """The few numbers of one device's Play."""
    new = opened(lab).room.curve(mine(), body.get("round"), body.get("seed"), body.get("steps"), body.get("loss"))
    return {"kept": new}


def take(lab: Lab, body: Mapping[str, Any]) -> dict[str, Any]:
    """Queue a cell of the grid; a participant's is their own, the presenter's the presenter's."""
    return {"cell": opened(lab).cells.take(asking.get().owner, body.get("place")).id}


def cancel(lab: Lab, body: Mapping[str, Any]) -> dict[str, Any]:
    visitor = asking.get()
    opened(lab).cells.cancel(None if visitor.sees_all else visitor.owner, body.get("cell"))
    return {"cell": body.get("cell")}


# ---- what the presenter does
def step(lab: Lab, body: Mapping[str, Any]) -> dict[str, Any]:
    """One of the four keys: {"stage": "predict", "question": {…}}, or "run", "reveal", "discuss"."""
    open_room, stage = presenting(lab), body.get("stage")
    if stage == "predict":
        given = body.get("question")
        if not isinstance(given, Mapping):
            raise UserError("Predict needs a question: a card, a preset of Play, or one of your own")
        question = asked(given)
        if question.act == "grid" and open_room.cells.grid() is None:
            raise UserError("set the grid first: ranks, matrices, task and steps")
        open_room.room.predict(question)
    elif stage == "lobby":
        open_room.room.begin_anew()
    else:
        open_room.room.go(stage)
    return {"stage": open_room.room.stage}


def set_grid(lab: Lab, body: Mapping[str, Any]) -> dict[str, Any]:
    """The grid {"ranks", "targets", "task", "steps", "teams"} and the budget {"minutes"}; gives the estimates."""
    open_room = presenting(lab)
    if "minutes" in body:
        open_room.room.budget(body["minutes"])
    if "ranks" in body:
        made = parsed(body, open_room.model)
        open_room.cells.set_grid(made, estimated(lab, made))
    return {"grid": grid(open_room, None, True)}


def estimated(lab: Lab, made: Grid) -> list[float]:
    """Seconds of training of every place of the grid, on this machine. UserError for what the model has not."""
    import lora_core as lc
    from app.pages.lab import built_in
    from app.room.grid import Plan
    from lora_core.estimate import estimate

    found = []
    with lab.session.model(made.model) as loaded:
        for rank, targets in made.places:
            plan = Plan(model=made.model, rank=rank, targets=targets, task=made.task, steps=made.steps).request()
            spec, config = lc.LoraSpec.from_dict(plan.spec), lc.TrainConfig.from_dict(plan.config)
            lc.select(lab.session.shapes[loaded.name], spec)
            task = built_in(made.task, 0)
            if any(r.rejected for r in task.train[:8]):
                raise UserError(f"task {made.task} is one of preferences, which cannot be trained in shared batches")
            found.append(estimate(loaded.model, spec, task, config, loaded.tokenizer).total_s)
    return found
