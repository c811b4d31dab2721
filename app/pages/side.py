"""What stands beside each other in Compare: runs' adapters as their dials stand, sums of two, and the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from app.pages.lab import Lab, title
from app.pages.session import Loaded
from app.pages.settings import Setting, cuts_of, setting_of
from app.runs.run import Run
from lora_core.errors import UserError

MOST_SIDES = 5  # texts at once, the base among them


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the texts beside each other: a run's adapter as its dials stand, with another one's added; or the base."""

    run: Run | None = None
    setting: Setting = field(default_factory=Setting)
    plus: Run | None = None


def sides_of(lab: Lab, run: Run, asked: Mapping[str, Any]) -> list[Side]:
    """What is written beside each other. UserError for what cannot be."""
    given = asked.get("sides")
    if given is None:
        setting = asked.get("setting")
        return [Side(), Side(run=run, setting=setting_of(cuts_of(run) if setting else None, setting))]
    if not isinstance(given, list) or not 1 <= len(given) <= MOST_SIDES:
        raise UserError(f"from one to {MOST_SIDES} texts can be written at once")
    sides = []
    for side in given:
        if not isinstance(side, Mapping) or side.get("run") is None:
            sides.append(Side())
            continue
        other, setting = other_run(lab, run, side["run"]), side.get("setting")
        plus = other_run(lab, run, side["plus"]) if side.get("plus") is not None else None
        if plus is not None and plus.id == other.id:
            raise UserError(f"{title(other)} is added to itself: turn its strength to 2 instead")
        setting = setting_of(cuts_of(other) if setting else None, setting)
        sides.append(Side(run=other, setting=setting, plus=plus))
    return sides


def other_run(lab: Lab, run: Run, id: Any) -> Run:
    """A run beside this one. UserError for one without an adapter, or of another model."""
    other = lab.run(id)
    if other.adapter is None:
        raise UserError(f"{title(other)} has no adapter to compare with")
    if other.request.model != run.request.model:
        raise UserError(f"{title(other)} adapts {other.request.model}, and this is {run.request.model}")
    return other


def attached(lab: Lab, loaded: Loaded, sides: list[Side]) -> list[str | None]:
    """The names of the sides' adapters on the model, None for the base. To be called within `model(…)`."""
    session = lab.session
    names: list[str | None] = []
    for slot, side in enumerate(sides):
        run, setting = side.run, side.setting
        if run is None or setting.base:
            names.append(None)
            continue
        assert run.adapter is not None
        if side.plus is not None:
            assert side.plus.adapter is not None
            names.append(session.sum(loaded, {run.id: run.adapter, side.plus.id: side.plus.adapter}))
        elif setting.whole:
            names.append(session.adapter(loaded, run.id, run.adapter))
        else:
            names.append(session.dialled(loaded, run.id, run.adapter, setting.ranks, setting.strength, slot))
    return names


def template_of(lab: Lab, loaded: Loaded, run: Run) -> str:
    """How a run's rows put a prompt. To be called within `model(…)`."""
    import lora_core as lc

    assert run.adapter is not None
    info = lc.get_adapter(loaded.model, lab.session.adapter(loaded, run.id, run.adapter)).info
    return str(info.get("template") or run.request.template or "{prompt} ->")
