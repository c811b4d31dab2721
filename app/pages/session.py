"""The one model in the server's process: loaded once, used by one at a time, with the adapters of runs attached.

Shapes of every model that was picked are kept as well (on torch's meta device, without weights): the budget is counted
from those, so that a dial is answered while the model itself is busy writing text.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.pages import owners
from lora_core.errors import UserError
from lora_core.home import home, read_json, write_json

ATTACHED = 12  # adapters that stay attached; the one used longest ago makes room
FACTS = "page.json"
logger = logging.getLogger("lora_lab.page")


@dataclass
class Loaded:
    """A model with its tokenizer, the names of the adapters on it in the order of their last use, and runs' dials."""

    name: str
    model: Any
    tokenizer: Any
    attached: OrderedDict[str, None] = field(default_factory=OrderedDict)
    dials: dict[int, Any] = field(default_factory=dict)


class ModelSession:
    """One model at a time. `model(name)` is how all work on it is serialised."""

    def __init__(self, stamp: str = "", training: Callable[[], bool] = lambda: False) -> None:
        self.stamp = stamp  # of this version of the page: facts that another one kept are not used
        self.training = training  # whether a worker has need of the processors
        self.lock = threading.RLock()
        self.waiting: list[None] = []  # one for each that wants the model; what can wait gives way to them
        self.words = threading.Lock()  # a tokenizer is not to be used by two threads at once
        self.loaded: Loaded | None = None
        self.shapes: dict[str, Any] = {}
        self.tokenizers: dict[str, Any] = {}
        self.known: dict[str, dict[str, Any]] = {}
        self.ready = threading.Event()

    # ---- before anybody asks
    def warm(self, name: str) -> None:
        """Load a model in the background, so that the page answers before torch is imported."""
        threading.Thread(target=self._warm, args=(name,), name="load-model", daemon=True).start()

    def _warm(self, name: str) -> None:
        try:
            self.load(name)
        except UserError as error:
            logger.warning("%s", error)
        except Exception:
            logger.exception("loading %s", name)
        finally:
            self.ready.set()

    # ---- facts: what the page needs to draw a model and to count its budget
    def facts(self, name: str, quick: bool = False) -> dict[str, Any]:
        """The model's facts; loads it where they are not known. Errors as in `load_model`.

        quick: while the default model is still being loaded, those of the last start will do.
        """
        if name in self.known:
            if self.loaded is not None:
                owners.may_load(name, self.names())
            return self.known[name]
        if quick and not self.ready.is_set():
            kept = read_kept(self.stamp)
            if kept and kept.get("name") == name:
                return kept
        return self.load(name)

    def load(self, name: str) -> dict[str, Any]:
        """Load a model, unless it is there, and give its facts."""
        with self.lock:
            owners.may_load(name, self.names())
            loaded = self._load(name)
            if loaded.name not in self.known:
                self.known[loaded.name] = self._facts(loaded)
                if self.stamp:
                    with suppress(OSError, UserError):
                        write_json(home() / FACTS, {"stamp": self.stamp, "facts": self.known[loaded.name]})
            self.known[name] = self.known[loaded.name]
            return self.known[name]

    def names(self) -> list[str]:
        """What the loaded model is called: its own name first."""
        if self.loaded is None:
            return []
        return [self.loaded.name, *(n for n, facts in self.known.items() if facts.get("name") == self.loaded.name)]

    def _load(self, name: str) -> Loaded:
        if self.loaded is not None and name in (self.loaded.name, self.known.get(name, {}).get("name")):
            known = self.known.get(name, {}).get("name", name)
            if known == self.loaded.name:
                return self.loaded
        import lora_core as lc

        self.loaded = None  # its memory first
        model, tokenizer = lc.load_model(name)
        if model.lora_lab.kind != "causal-lm":
            raise UserError(f"'{name}' is an encoder; this page trains models that write text")
        self.loaded = Loaded(model.lora_lab.name, model, tokenizer)
        self.tokenizers[self.loaded.name] = tokenizer
        return self.loaded

    def _facts(self, loaded: Loaded) -> dict[str, Any]:
        import lora_core as lc
        from lora_core.estimate import seconds_per_flop
        from lora_core.models import empty_model

        dtype = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
        shapes = self.shapes[loaded.name] = empty_model(loaded.model.lora_lab.folder, dtype=dtype)
        drawing: dict[str, Any] = dict(lc.layer_shapes(shapes))
        if not drawing["matrices"]:
            kind = type(loaded.model).__name__
            raise UserError(f"{kind} is an architecture that this page cannot draw; the command line can adapt its "
                            "modules by their paths")  # fmt: skip
        return {
            "name": loaded.name,
            **drawing,
            "coefficients": lc.budget_coefficients(shapes),
            "s_per_flop": seconds_per_flop(loaded.model),
            "dtype": dtype,
            "device": next(loaded.model.parameters()).device.type,
            "config": lc.TrainConfig().to_dict(),
            "spec": lc.LoraSpec().to_dict(),
        }

    # ---- work on the model
    @contextmanager
    def model(self, name: str) -> Iterator[Loaded]:
        """The model, for this block alone."""
        self.waiting.append(None)
        self.lock.acquire()
        self.waiting.pop()
        try:
            self.load(name)
            assert self.loaded is not None
            self._share()
            yield self.loaded
        finally:
            self.lock.release()

    def _share(self) -> None:
        """All processors, or half of them beside a training: two full sets of threads wait for each other's turns."""
        import torch

        from lora_core.machine import threads

        torch.set_num_threads(max(1, threads() // 2 if self.training() else threads()))

    @contextmanager
    def free_model(self, name: str) -> Iterator[Loaded | None]:
        """The model if it is loaded and nobody uses it, else None, at once."""
        if not self.lock.acquire(blocking=False):
            yield None
            return
        try:
            same = self.loaded is not None and self.loaded.name == self.known.get(name, {}).get("name")
            yield self.loaded if same else None
        finally:
            self.lock.release()

    def adapter(self, loaded: Loaded, run: int, folder: Path) -> str:
        """The name of a run's adapter, attached now if it was not. To be called within `model(…)`."""
        import lora_core as lc

        name = f"run-{run}"
        if name not in loaded.attached:
            lc.load_adapter(loaded.model, folder, name, allow_zero=True)
            lc.get_adapter(loaded.model, name).enable(False)
        self._used(loaded, name)
        return name

    def dialled(self, loaded: Loaded, run: int, folder: Path, ranks: Any, strength: float, slot: int = 0) -> str:
        """The name of a run's adapter with its dials turned (see `lora_core.Dials`); one for each slot at a time."""
        import lora_core as lc

        whole = lc.get_adapter(loaded.model, self.adapter(loaded, run, folder))
        dials = loaded.dials.get(run)
        if dials is None or dials.adapter is not whole:
            dials = loaded.dials[run] = lc.Dials(whole)
            for old in [n for n in loaded.attached if n.startswith(f"run-{run}-dials-")]:
                del loaded.attached[old]
                lc.get_adapter(loaded.model, old).detach()
        name = f"run-{run}-dials-{slot}"
        if name in loaded.attached:
            dials.turn(lc.get_adapter(loaded.model, name), ranks, strength)
        else:
            dials.attach(ranks, strength, name)
        self._used(loaded, name)
        return name

    def sum(self, loaded: Loaded, runs: Mapping[int, Path]) -> str:
        """The name of the sum of runs' adapters, {run: folder}: W0 + ΔW₁ + ΔW₂. UserError for what does not add up."""
        import lora_core as lc

        parts = {self.adapter(loaded, run, folder): 1.0 for run, folder in runs.items()}
        name = "sum-" + "-".join(map(str, sorted(runs)))
        if name not in loaded.attached:
            lc.combine(loaded.model, parts, name)
        self._used(loaded, name)
        return name

    def _used(self, loaded: Loaded, name: str) -> None:
        import lora_core as lc

        loaded.attached[name] = None
        loaded.attached.move_to_end(name)
        while len(loaded.attached) > ATTACHED:
            oldest, _ = loaded.attached.popitem(last=False)
            old = lc.get_adapter(loaded.model, oldest)
            for run in [run for run, dials in loaded.dials.items() if dials.adapter is old]:
                del loaded.dials[run]
            old.detach()

    def speed(self) -> float | None:
        """Seconds of a floating point operation of the loaded model's training, as far as this machine knows by now."""
        from lora_core.estimate import seconds_per_flop

        if self.loaded is None:
            return None
        found = self.known[self.loaded.name]["s_per_flop"] = seconds_per_flop(self.loaded.model)
        return found


def read_kept(stamp: str) -> dict[str, Any] | None:
    """The facts that the last start left behind, if the same version of the page did."""
    with suppress(UserError):
        kept = read_json(home() / FACTS)
        if isinstance(kept, dict) and kept.get("stamp") == stamp:
            return kept.get("facts")
    return None
