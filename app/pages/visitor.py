"""Who asks: set by the guard for each request, read by whatever must know whose things these are.

On this machine alone there is one person, the host, who may see and do everything. In a room the presenter may too;
each participant has an id of their own, kept in a cookie, and reads and changes what is theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["host", "presenter", "participant"]


@dataclass(frozen=True, kw_only=True)
class Visitor:
    """owner: a random id, "" for the host and the presenter."""

    role: Role = "host"
    owner: str = ""

    @property
    def sees_all(self) -> bool:
        return self.role != "participant"

    def may_see(self, owner: str) -> bool:
        """Whether what belongs to that owner is theirs to read and to change."""
        return self.sees_all or owner == self.owner


HOST = Visitor()
asking: ContextVar[Visitor] = ContextVar("asking", default=HOST)


def asked_by(who: Visitor, answers: Iterator[Any]) -> Iterator[Any]:
    """The same answers, each made while `who` asks; for what is called from elsewhere than a request."""
    context = copy_context()
    context.run(asking.set, who)
    try:
        while True:
            try:
                answer = context.run(next, answers)
            except StopIteration:
                return
            yield answer
    finally:
        if (close := getattr(answers, "close", None)) is not None:
            context.run(close)
