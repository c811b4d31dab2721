"""`lora-lab serve` whose experiments measure nothing (tests/experiment_kit.py): `python -m … --port 0`."""

from __future__ import annotations

import sys

from app.runs import experiments
from app.server import serve
from tests.experiment_kit import STAND_IN

if __name__ == "__main__":
    experiments.WORKER = STAND_IN
    serve(port=int(sys.argv[sys.argv.index("--port") + 1]), open_browser=False)
