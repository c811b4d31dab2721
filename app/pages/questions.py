"""Questions: what is asked, and only to those who have guessed what was found; and running it again on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app import figures_experiments
from app.pages import owners, words
from app.pages.lab import Lab
from app.runs.experiments import State
from lora_core.errors import UserError
from lora_core.experiments import experiments, find_experiment, results_here, stored_result
from lora_core.experiments.experiment import Experiment, Result

QUICK_S = 120.0  # what a quick version is made to take, where nothing else is known
# what stands in the list of questions; others are called by their names
TITLES = {
    "storage": "More than 100 %?", "switch": "Switching tasks", "w-rank": "Is W of low rank?", "rank": "Which rank?",
    "which": "Which matrices?", "subspace": "Same directions?", "amplify": "ΔW beside W", "truncate": "Really low?",
    "alpha": "Why α/r?", "latency": "Is it slower?", "objective": "Any objective?", "choose": "A rule to choose",
    "forget": "What does it cost?", "methods": "Other methods", "generalises": "As good as full?",
}  # fmt: skip
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def asked(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """All questions with their three answers, and how what is run here stands. Nothing of what was found."""
    cards = [{"name": e.name, "title": title(e), "section": e.section.replace(" and ", ", "),
              "question": e.question,
              "choices": list(e.choices)} for e in experiments()]  # fmt: skip
    return {"cards": cards, **states(lab, query)}


def title(e: Experiment) -> str:
    return TITLES.get(e.name, e.name.replace("-", " ").capitalize())


def states(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """What is run here, or was last: asked for once a second while something is going on."""
    found = lab.experiments.states()
    return {"states": {n: s | {"says": says(s)} for n, s in found.items()}}


def says(state: State) -> str:
    """How an attempt stands, in a line."""
    version = "the quick version" if state["quick"] else "the full version"
    left = "" if state["left_s"] is None else f", about {words.duration(state['left_s'])} left"
    done = f"{100 * state['done']:.0f} %"
    return {
        "waiting": f"{version} waits: {state['cell']}",
        "running": f"{version}: {state['cell']}, {done}{left}",
        "stopping": f"{version} ends after its present step",
        "stopped": f"{version} was stopped at {done}; it goes on from there",
        "interrupted": f"{version} was interrupted at {done}; it goes on from there",
        "failed": f"{version} failed: {state['error']}",
        "done": f"{version} is done",
    }[state["status"]]


def answered(lab: Lab, query: Mapping[str, str]) -> dict[str, Any]:
    """What the paper claims and what was found: the recorded result, and those of this machine."""
    e = find_experiment(query.get("name", ""))
    stored, here = stored_result(e.name), results_here(e.name)
    recorded = [shown(stored, "recorded")] if stored else []
    return {
        "name": e.name,
        "section": e.section,
        "claim": e.claim,
        "answer": e.answer,
        "paper": paper(e),
        "results": recorded + [shown(r, "live, here") for r in here],
        "takes": {"quick": takes(True, [stored, *here]), "full": takes(False, [stored, *here])},
    }


def shown(r: Result, where: str) -> dict[str, Any]:
    """A result as the page draws it; what it is made with stands beside it."""
    figure = figures_experiments.figure(r)
    layout = figure["layout"]
    count = r.machine.get("threads", "?")
    machine = f"{r.machine.get('chip') or 'a machine'}, {count} thread{'s' * (count != 1)}"
    if r.machine.get("device", "cpu") != "cpu":
        machine = f"{r.machine['device']} beside {machine}"
    facts = [("model", r.model), ("seeds", ", ".join(map(str, r.seeds))), ("took", words.duration(r.seconds)),
             ("on", machine), *([("made", day(r.made))] if r.made else [])]  # fmt: skip
    return {
        "where": where,
        "quick": r.quick,
        "verdict": r.verdict,
        "sentence": r.sentence,
        "title": layout["title"]["text"],
        "say": layout["meta"]["say"],
        "table": layout["meta"]["table"],
        "figure": {"data": figure["data"], "layout": {k: v for k, v in layout.items() if k != "title"}},
        "facts": facts,
        "command": r.command,
    }


def day(iso: str) -> str:
    """2026-11-24 as 24 Nov 2026; anything else as it is."""
    parts = iso.split("-")
    if len(parts) == 3 and all(p.isdigit() for p in parts) and 1 <= int(parts[1]) <= 12:
        return f"{int(parts[2])} {MONTHS[int(parts[1]) - 1]} {parts[0]}"
    return iso


def paper(e: Experiment) -> dict[str, Any]:
    """The paper's own numbers: columns of equal length as a table, the rest as lines of name and words."""
    lists = {k: v for k, v in e.paper.items() if isinstance(v, (list, tuple))}
    n = max((len(v) for v in lists.values() if not all(isinstance(x, str) for x in v)), default=0)
    columns = {k: v for k, v in lists.items() if len(v) == n}
    table = [list(columns), *([str(v[i]) for v in columns.values()] for i in range(n))] if n else []
    lines = [[k, "; ".join(map(str, v)) if isinstance(v, (list, tuple)) else str(v)] for k, v in e.paper.items()
             if k not in columns]  # fmt: skip
    return {"table": table, "lines": lines}


def takes(quick: bool, results: list[Result | None]) -> str:
    """How long the quick or the full version takes: as the last one did here, or as the recorded one did."""
    known = [r.seconds for r in results if r is not None and r.quick == quick]
    if known:
        return f"≈ {words.duration(known[-1])}"
    return f"≈ {words.duration(QUICK_S)}" if quick else "up to 40 min"


def start(lab: Lab, body: Mapping[str, Any]) -> dict[str, Any]:
    """Run it here, quick or full."""
    owners.only_host("experiments take long")
    quick = body.get("quick")
    if not isinstance(quick, bool):
        raise UserError(f"quick is true or false; given {quick!r}")
    lab.experiments.start(str(body.get("name", "")), quick)
    return states(lab, {})


def stop(lab: Lab, body: Mapping[str, Any]) -> dict[str, Any]:
    owners.only_host("experiments are the whole room's")
    lab.experiments.stop(str(body.get("name", "")))
    return states(lab, {})
