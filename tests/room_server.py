"""A server with a room, in a process of its own: with the real model, or with a stand-in for model and training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@contextmanager
def serving(home: Path | None = None, *, stand_in: bool = False) -> Iterator[tuple[str, dict[str, str]]]:
    """(url, {"presenter": key, "participant": key}) while the block lasts.

    home: LoRA Lab's folder, a new one where there is none; stand_in: see `main`
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = home or Path(temporary)
        if not stand_in:
            from lora_core import embedded
            from lora_core.home import home_path
            from lora_core.models import DEFAULT

            embedded.fetch(DEFAULT)
            with suppress(OSError):
                (folder / "models").symlink_to(home_path() / "models")
                for name in ("machine.json", "speed.json"):  # how fast this machine is, so that it is not timed again
                    shutil.copy(home_path() / name, folder)
        env = {**os.environ, "LORA_LAB_HOME": str(folder), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "tests.room_server"] if stand_in else [
            sys.executable, "-m", "app.cli", "serve", "--room", "--no-browser", "--port", "0"]  # fmt: skip
        process = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT)  # fmt: skip
        try:
            assert process.stdout is not None
            url = ""
            for line in process.stdout:
                if "LoRA Lab is at" in line:
                    url = line.split()[4].split("/?")[0]
                    break
            assert url, f"the server ended with status {process.wait()}"
            yield url, json.loads((folder / "keys.json").read_text(encoding="utf-8"))
        finally:
            process.terminate()
            process.wait(30)


def main() -> None:
    """The server without a model: cells are estimated at four seconds, and trained by a stand-in."""
    from app import server
    from app.pages import room
    from app.pages.session import ModelSession
    from app.runs.queue import RunQueue
    from lora_core.errors import UserError
    from tests.room_kit import STAND_IN

    def no_model(self: ModelSession, name: str) -> dict[str, object]:
        raise UserError(f"no model '{name}' in this test")

    changed: list[tuple[Any, str, Any]] = [
        (server, "RunQueue", partial(RunQueue, command=STAND_IN)),
        (server, "create_app", partial(server.create_app, model=None)),
        (room, "estimated", lambda lab, made: [4.0] * len(made.places)),
        (ModelSession, "load", no_model),
    ]
    for owner, name, value in changed:
        setattr(owner, name, value)
    server.serve(port=0, open_browser=False, room=True)


if __name__ == "__main__":
    main()
