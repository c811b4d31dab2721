# ruff: noqa: F401  (names below TYPE_CHECKING are the public ones, for editors)
"""LoRA Lab's library: low-rank adaptation, small enough to read and right enough to trust.

    import lora_core as lc
    model, tokenizer = lc.load_model("smollm2-135m")
    adapter = lc.attach(model, lc.LoraSpec(targets=("q", "v"), rank=8, alpha=16), name="e2e")
    for event in lc.train(adapter, lc.load_task("restaurant"), lc.TrainConfig(steps=60)):
        print(event.step, event.loss)
    lc.spectra(adapter)

Names are loaded at their first use, so that `import lora_core` costs nothing and reading an adapter needs no torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

_HOME = {
    "lora_core.errors": ("UserError",),
    "lora_core.home": ("home",),
    "lora_core.spec": ("LoraSpec",),
    "lora_core.models": ("load_model", "registry"),
    "lora_core.sites": ("Site", "find_sites", "layer_shapes"),
    "lora_core.selection": ("listing", "select"),
    "lora_core.adapter": ("Adapter", "attach", "load_adapter", "rows", "switch"),
    "lora_core.registry": ("get_adapter",),
    "lora_core.methods": ("method_spec", "size_for"),
    "lora_core.combine": ("combine", "drift", "subtract_add"),
    "lora_core.delta": ("Delta",),
    "lora_core.budget": ("Budget", "budget", "budget_coefficients"),
    "lora_core.estimate": ("seconds_per_step",),
    "lora_core.files": ("Stored", "read_adapter"),
    "lora_core.foreign": ("Opened", "open_any"),
    "lora_core.audit": ("Audit", "MatrixAudit", "audit"),
    "lora_core.compress": ("Compressed", "compress"),
    "lora_core.spectra": ("Spectrum", "same_norm_random", "spectra"),
    "lora_core.subspace": ("amplification", "geodesic_distance", "phi", "projection_distance"),
    "lora_core.tasks": ("Row", "Task", "labels_of", "load_data", "load_task", "task_names"),
    "lora_core.objective": ("CausalLM", "Objective"),
    "lora_core.classification": ("Classification",),
    "lora_core.preference": ("Preference",),
    "lora_core.sweep": ("SweepEvent", "sweep"),
    "lora_core.train": ("TrainConfig", "TrainEvent", "train"),
    "lora_core.generate": ("Generation", "generate"),
    "lora_core.cuts": ("Cuts", "measure_cuts"),
    "lora_core.dials": ("Dials", "losses_together"),
    "lora_core.knockout": ("Holders", "gain_shares", "holders"),
    "lora_core.merge_fit": ("Fit", "merge_fit"),
    "lora_core.evaluate": ("Loss", "TokenDiff", "evaluate", "measure", "score", "text_differences",
                           "token_differences"),
    "lora_core.effect": ("Effect",),
    "lora_core.changed": ("measure_effect",),
    "lora_core.frames": ("to_frame",),
    "lora_core.experiments": ("Experiment", "Lab", "Result", "find_experiment", "run_experiment", "stored_result"),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}
__version__ = "0.1.0"

if TYPE_CHECKING:
    from lora_core.adapter import Adapter, attach, load_adapter, rows, switch
    from lora_core.audit import Audit, MatrixAudit, audit
    from lora_core.budget import Budget, budget, budget_coefficients
    from lora_core.changed import measure_effect
    from lora_core.classification import Classification
    from lora_core.combine import combine, drift, subtract_add
    from lora_core.compress import Compressed, compress
    from lora_core.cuts import Cuts, measure_cuts
    from lora_core.delta import Delta
    from lora_core.dials import Dials, losses_together
    from lora_core.effect import Effect
    from lora_core.errors import UserError
    from lora_core.estimate import seconds_per_step
    from lora_core.evaluate import Loss, TokenDiff, evaluate, measure, score, text_differences, token_differences
    from lora_core.experiments import Experiment, Lab, Result, find_experiment, run_experiment, stored_result
    from lora_core.files import Stored, read_adapter
    from lora_core.foreign import Opened, open_any
    from lora_core.frames import to_frame
    from lora_core.generate import Generation, generate
    from lora_core.home import home
    from lora_core.knockout import Holders, gain_shares, holders
    from lora_core.merge_fit import Fit, merge_fit
    from lora_core.methods import method_spec, size_for
    from lora_core.models import load_model, registry
    from lora_core.objective import CausalLM, Objective
    from lora_core.preference import Preference
    from lora_core.registry import get_adapter
    from lora_core.selection import listing, select
    from lora_core.sites import Site, find_sites, layer_shapes
    from lora_core.spec import LoraSpec
    from lora_core.spectra import Spectrum, same_norm_random, spectra
    from lora_core.subspace import amplification, geodesic_distance, phi, projection_distance
    from lora_core.sweep import SweepEvent, sweep
    from lora_core.tasks import Row, Task, labels_of, load_data, load_task, task_names
    from lora_core.train import TrainConfig, TrainEvent, train


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lora_core' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_WHERE)


class _Package(ModuleType):
    """`lora_core.train` is the function, whoever imports the file of that name first, and however."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
