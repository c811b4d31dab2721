"""The paper's questions, answered by experiment: one file a question, results that are kept, a verdict from numbers.

    from lora_core.experiments import Lab, run_experiment
    result = run_experiment("rank", Lab(quick=True))
    print(result.verdict, result.sentence)

The results of our own runs lie in `results/` and are there at once: `stored_result("rank")`.
"""

from __future__ import annotations

import importlib
from datetime import date
from pathlib import Path
from typing import Any

from lora_core.errors import unknown
from lora_core.experiments.experiment import Experiment, Result
from lora_core.experiments.lab import Cell, Lab, Progress, Stopped
from lora_core.home import home_path, read_json, write_text, writing

__all__ = ["Cell", "Experiment", "Lab", "Progress", "Result", "Stopped", "experiments", "find_experiment",
           "result_here", "results_here", "run_experiment", "stored_result"]  # fmt: skip

NAMES = ("storage", "switch", "w-rank", "rank", "which", "choose", "subspace", "amplify", "truncate", "forget", "alpha",
         "latency", "objective", "methods", "generalises")  # fmt: skip
RESULTS = Path(__file__).parent / "results"
LARGEST = 8 << 20  # bytes of a result's file


def experiments() -> list[Experiment]:
    """All experiments, in the order of the paper's sections as far as it goes."""
    return [find_experiment(name) for name in NAMES]


def find_experiment(name: str) -> Experiment:
    """The experiment of that name; UserError with the nearest match where there is none."""
    if name not in NAMES:
        raise unknown("experiment", str(name), NAMES)
    return importlib.import_module(f"lora_core.experiments.{name.replace('-', '_')}").EXPERIMENT


def run_experiment(name: str, lab: Lab | None = None) -> Result:
    """Run an experiment, or what is left of it, and keep the result in `home()/experiments`.

    Killed or stopped (`Stopped`), it goes on from its last finished cell when it is run again with the same settings.
    """
    lab = lab or Lab()
    e = find_experiment(name)
    lab.begin(e)
    rows = e.run(lab)
    assert lab.cells is not None
    verdict, sentence = e.judge(rows)
    result = Result(name=e.name, question=e.question, claim=e.claim, verdict=verdict, sentence=sentence,
                    rows=tuple(rows), quick=lab.quick, seconds=sum(lab.cells.seconds.values()),
                    model=", ".join(lab.names[w] for w in sorted(lab.used)), machine=_machine(),
                    command=_command(e.name, lab), seeds=lab.seeds, made=date.today().isoformat())  # fmt: skip
    file = _kept(name, lab.quick)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, result.to_json())
    lab.cells.drop()
    return result


def stored_result(name: str) -> Result | None:
    """The result that ships with this library; None where there is none yet."""
    return _read(RESULTS / f"{find_experiment(name).name}.json")


def result_here(name: str) -> Result | None:
    """The last full result of this machine, else its last quick one, else None."""
    return next(iter(results_here(name)), None)


def results_here(name: str) -> list[Result]:
    """All that was found on this machine: the last full result, then the last quick one, as far as they exist."""
    find_experiment(name)
    return [r for r in (_read(_kept(name, False)), _read(_kept(name, True))) if r is not None]


def _kept(name: str, quick: bool) -> Path:
    return home_path() / "experiments" / f"{name}{'-quick' if quick else ''}.json"


def _read(file: Path) -> Result | None:
    d = read_json(file, LARGEST)
    return Result.from_dict(d) if isinstance(d, dict) else None


def _machine() -> dict[str, Any]:
    from lora_core.machine import device, fingerprint

    return {**fingerprint(), "device": device()}


def _command(name: str, lab: Lab) -> str:
    words = ["lora-lab experiment run", name]
    words += ["--quick"] if lab.quick else []
    words += [f"--{w} {lab.names[w]}" for w in sorted(lab.used) if lab.names[w] != DEFAULTS[w]]
    words += [f"--seeds {','.join(map(str, lab.seeds))}"] if lab.seeds != (0, 1, 2) else []
    words += [f"--steps {lab.steps_given}"] if lab.steps_given else []
    return " ".join(words)


DEFAULTS = Lab().names
