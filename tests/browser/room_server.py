"""`lora-lab serve --room` without a model: cells are estimated at four seconds, and trained by a stand-in."""

from __future__ import annotations

from app import server
from app.pages import room
from app.pages.session import ModelSession
from app.runs import queue
from lora_core.errors import UserError
from tests.room_kit import STAND_IN


def no_model(self: ModelSession, name: str) -> dict[str, object]:
    raise UserError(f"no model '{name}' in this test")


def main() -> None:
    queue.RunQueue.__init__.__kwdefaults__["command"] = STAND_IN
    room.estimated = lambda lab, made: [4.0] * len(made.places)
    ModelSession.load = no_model
    create = server.create_app
    server.create_app = lambda *a, **k: create(*a, **k, model=None)
    server.serve(port=0, open_browser=False, room=True)


if __name__ == "__main__":
    main()
