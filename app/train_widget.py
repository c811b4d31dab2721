"""Training in a notebook: a live curve, and a Stop that works while the kernel trains."""

from __future__ import annotations

import html
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import ipywidgets as W

import lora_core as lc
from app import figures
from app.explorer import Chart, Explorer
from lora_core.errors import UserError

REFRESH_S = 0.4  # between two drawings of the curve


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a TrainWidget has done so far: the adapter, all events, and how it ended (None while it trains)."""

    adapter: lc.Adapter
    events: tuple[lc.TrainEvent, ...]
    reason: str | None
    loss: float | None
    base_loss: float | None

    def to_frame(self) -> Any:
        """The events as a pandas DataFrame."""
        return lc.to_frame(self.events)


class TrainWidget(Explorer):
    """Trains in a thread, so that the kernel stays free: a live curve, Train, and Stop after the current step.

    The adapter is attached when Train is pressed or `start()` called, with the spec's settings; a second Train begins
    anew. `wait()` blocks until the end, as a notebook that runs from top to bottom needs. Buttons do not reach a kernel
    that waits, but interrupting it there stops the training and keeps the adapter. Do not use the model otherwise
    while it trains.
    """

    def __init__(self, model: Any, spec: lc.LoraSpec, task: lc.Task | str, config: lc.TrainConfig | None = None, *,
                 name: str = "widget", objective: Any = None, tokenizer: Any = None) -> None:  # fmt: skip
        self.model, self.spec, self.name = model, spec, name
        self.config = config or lc.TrainConfig()
        self.task = lc.load_task(task, seed=self.config.seed) if isinstance(task, str) else task
        self._more = {"objective": objective, "tokenizer": tokenizer}
        self.adapter: lc.Adapter | None = None
        self.events: list[lc.TrainEvent] = []
        self.error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._stop, self._ended = threading.Event(), threading.Event()
        self.train = W.Button(description="Train", button_style="primary")
        self.stop = W.Button(description="Stop", disabled=True)
        self.progress = W.IntProgress(min=0, max=self.config.steps, layout=W.Layout(width="40%"))
        self.figure = Chart(figures.loss([{"steps": self.config.steps}]), f"Loss on {self.task.name}")
        super().__init__(W.HBox([self.train, self.stop, self.progress]), self.figure)
        self.train.on_click(lambda _: self.start())
        self.stop.on_click(lambda _: self.halt())
        self.tell(f"{lc.budget(model, spec).trainable:,} parameters, {self.config.steps} steps.")

    @property
    def running(self) -> bool:
        return self._thread is not None and not self._ended.is_set()

    def start(self) -> TrainWidget:
        """Begin training in a thread; nothing while it trains already."""
        if self.running:
            return self
        if self.adapter is not None:
            self.adapter.detach()
        self.adapter = lc.attach(self.model, self.spec, self.name, seed=self.config.seed)
        self.events, self.error = [], None
        self._stop.clear()
        self._ended.clear()
        self.train.disabled, self.stop.disabled = True, False
        self._thread = threading.Thread(target=self._run, args=(self.adapter,), daemon=True)
        self._thread.start()
        return self

    def halt(self) -> None:
        """End after the current step; the adapter is kept."""
        self._stop.set()
        self.stop.disabled = True

    def wait(self) -> Trained:
        """Block until the training has ended; an interrupt ends it."""
        while self.running:
            try:
                self._ended.wait(0.2)  # a join that is interrupted may take the thread for dead
            except KeyboardInterrupt:
                self.halt()
        return self.result()

    def result(self) -> Trained:
        """What there is so far. Raises what the training raised; UserError before it was started."""
        if self.error is not None:
            raise self.error
        if self.adapter is None:
            raise UserError("nothing was trained yet: press Train, or call start()")
        held = figures.held_out([e.to_dict() for e in self.events])
        return Trained(adapter=self.adapter, events=tuple(self.events), loss=held[-1][1] if held else None,
                       reason=next((e.reason for e in self.events if e.kind == "end"), None),
                       base_loss=held[0][1] if held else None)  # fmt: skip

    def _run(self, adapter: lc.Adapter) -> None:
        drawn = 0.0
        try:
            config = replace(self.config, norms_every=0)
            for event in lc.train(adapter, self.task, config, stop=self._stop.is_set, **self._more):
                self.events.append(event)
                if time.monotonic() - drawn > REFRESH_S or event.kind in ("base", "end"):
                    self._draw(event)
                    drawn = time.monotonic()
        except UserError as error:
            self.error = error
            self.tell(f"<span style='color:#b91c1c'>{html.escape(str(error))}</span>")
        except Exception as error:  # shown here, raised by result(): a thread has nobody to raise it to
            self.error = error
            self.tell(f"<span style='color:#b91c1c'>training failed: {html.escape(str(error))}</span>")
        finally:
            self.train.disabled, self.stop.disabled = False, True
            self._ended.set()

    def _draw(self, event: lc.TrainEvent) -> None:
        self.figure.put(figures.loss([e.to_dict() for e in self.events]))
        self.progress.value = event.step
        held = figures.held_out([e.to_dict() for e in self.events])
        left = f", {event.left_s:.0f} s left" if event.left_s and event.kind != "end" else ""
        words = f"step <b>{event.step}</b> of {event.steps}{left}"
        if held:
            words += f"; held-out loss {held[0][1]:.2f} → <b>{held[-1][1]:.2f}</b>"
        self.tell(words + (f". {html.escape(event.message)}" if event.message else ""))
