"""Explorers for notebooks, with the page's figures: each is an ipywidget to look at and has `result()` to compute on.

SpectrumExplorer(adapter)             any matrix's singular values beside noise of the same size
RankDial(adapter, "name : …", task)   ΔW cut to rank k: what is left of spectrum, text and loss
BudgetExplorer(model)                 what an adapter costs before it is trained
TrainWidget(model, spec, task)        a live curve, and a Stop that works while the kernel trains (train_widget.py)
Playground("bzero", r=2)              the page's Play tab (playground.py)
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import ipywidgets as W

import lora_core as lc
from app import charts, figures
from app.explorer import Chart, Explorer
from app.figures import Figure
from app.playground import Playground
from app.train_widget import Trained, TrainWidget
from lora_core.errors import UserError
from lora_core.spectra import energy, energy_rank, same_norm_random
from lora_core.tasks import prompt_text
from lora_core.train import tokenizer_of

__all__ = ["BudgetExplorer", "Playground", "RankCut", "RankDial", "SpectrumExplorer", "TrainWidget", "Trained"]


class SpectrumExplorer(Explorer):
    """All matrices of an adapter (attached or read from its folder) by size, and the spectrum of one of them.

    Pick a matrix by its layer and name, or click on its cell.
    """

    def __init__(self, adapter: Any) -> None:
        self.spectra = lc.spectra(adapter)
        if not self.spectra:
            raise UserError("this adapter has no low-rank updates: there is no spectrum to show")
        self._at = {(s.layer, s.target): k for k, s in self.spectra.items()}
        targets = list(dict.fromkeys(s.target for s in self.spectra.values()))
        layers = list(dict.fromkeys(s.layer for s in self.spectra.values()))
        first = max(self.spectra.values(), key=lambda s: s.norm)
        self.target = W.ToggleButtons(options=targets, value=first.target, description="matrix",
                                      style={"button_width": "auto"})  # fmt: skip
        self.layer = W.SelectionSlider(options=layers, value=first.layer, description="layer")
        size = {at: self.spectra[key].norm for at, key in self._at.items()}
        values = {t: [size.get((x, t)) for x in layers] for t in targets}
        self._layers, self._targets = layers, targets
        self.map = Chart(figures.heatmap(values, "‖ΔW‖"), "Where the update is large", 150 + 26 * len(targets))
        cast(Any, self.map).data[0].on_click(self._click)
        self.figure = Chart(self._drawn(), self._title())
        super().__init__(self.map, W.HBox([self.target, self.layer]), self.figure)
        self.target.observe(self._follow, "value")
        self.layer.observe(self._follow, "value")
        self._follow()

    def result(self) -> lc.Spectrum:
        """The Spectrum that is shown; where the layer lacks that matrix, of the nearest layer that has it."""
        have = [(k, key) for k, key in self._at.items() if k[1] == self.target.value]
        near = min(have, key=lambda item: abs((item[0][0] or 0) - (self.layer.value or 0)))
        return self.spectra[near[1]]

    def _click(self, trace: Any, points: Any, state: Any) -> None:
        if points.xs:
            self.layer.value, self.target.value = self._layers[int(points.xs[0])], str(points.ys[0])

    def _title(self) -> str:
        s = self.result()
        return f"Singular values of ΔW: layer {s.layer}, {s.target}"

    def _drawn(self) -> Figure:
        s = self.result()
        null = same_norm_random(s.shape[0], s.shape[1], s.rank, s.norm)
        return figures.spectrum(list(s.singular_values), energy(s.singular_values).tolist(), null.tolist(),
                                energy(null).tolist(), needed=s.energy_90)  # fmt: skip

    def _follow(self, change: Any = None) -> None:
        s = self.result()
        null = same_norm_random(s.shape[0], s.shape[1], s.rank, s.norm)
        self.figure.put(self._drawn(), self._title())
        self.tell(f"<b>{s.energy_90} of {s.rank}</b> directions hold 90 % of Σσ²; noise of the same size needs"
                  f" {energy_rank(energy(null), 0.9) if s.norm else 0}. ‖ΔW‖ = {s.norm:.3g}, stable rank"
                  f" {s.stable_rank:.1f}.")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RankCut:
    """An adapter cut to rank k: the share of Σσ² over all matrices that is left, held-out losses (nats), texts."""

    rank: int
    kept_energy: float
    loss: float | None
    base_loss: float | None
    text: str
    base_text: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class RankDial(Explorer):
    """A dial for the rank k that every ΔW is cut to (Eckart–Young): the spectrum, the text and the loss follow.

    prompt     what is continued, put into the template
    task       for the template, and its held-out rows for the loss (the first `rows`); None: text alone
    tokens     most new tokens of a text
    """

    def __init__(self, adapter: lc.Adapter, prompt: str, task: lc.Task | None = None, *, rows: int = 8,
                 tokens: int = 32, tokenizer: Any = None) -> None:  # fmt: skip
        self.adapter, self.task = adapter, task
        self.tokenizer = tokenizer or tokenizer_of(adapter.model)
        template = task.template if task else adapter.info.get("template", "{prompt} ->")
        self.prompt = prompt_text(self.tokenizer, lc.Row(prompt, ""), template)
        self._rows, self._tokens, self._seen = rows, tokens, {}
        self._kept = lc.audit(adapter).kept_energy
        self.most = len(self._kept) - 1
        self.top = max(lc.spectra(adapter).values(), key=lambda s: s.norm)
        self.rank = W.IntSlider(value=self.most, min=0, max=self.most, description="cut to k",
                                continuous_update=False, layout=W.Layout(width="60%"))  # fmt: skip
        self.spectrum = Chart(self._spectrum(), f"σ of the largest ΔW (layer {self.top.layer}, {self.top.target})", 330)
        self.losses = Chart(self._losses(), "Held-out loss of the cuts seen so far", 330)
        self.texts = W.HTML()
        half = [W.Box([c], layout=W.Layout(width="50%")) for c in (self.spectrum, self.losses)]
        super().__init__(self.rank, W.HBox(half) if task else self.spectrum, self.texts)
        self.rank.observe(self._follow, "value")
        self._follow()

    def result(self) -> RankCut:
        """What is shown now."""
        return self.at(self.rank.value)

    def at(self, k: int) -> RankCut:
        """The adapter cut to rank k, 0 for the model without it; measured once for each k."""
        if k not in range(self.most + 1):
            raise UserError(f"k is {k!r}; it is a whole number from 0 to {self.most}")
        if k not in self._seen:
            self._seen[k] = self._measure(k)
        return self._seen[k]

    def _measure(self, k: int) -> RankCut:
        model, name = self.adapter.model, self.adapter.name
        cut = None
        if 0 < k < self.most:
            cut = lc.combine(model, {name: 1.0}, f"{name}-cut-{k}", method="svd", rank=k)
        which = cut.name if cut else name if k else None
        try:
            *_, last = lc.generate(model, self.tokenizer, self.prompt, [None, which], max_new_tokens=self._tokens)
            loss: Mapping[str | None, Any] = {}
            if self.task and self.task.test:
                loss = lc.evaluate(model, self.tokenizer, self.task.test[: self._rows], template=self.task.template,
                                   adapters=[None, which] if which else [None])  # fmt: skip
        finally:
            if cut:
                cut.detach()
        base, text = last.texts[0]
        return RankCut(rank=k, kept_energy=self._kept[k], loss=loss[which].loss if loss else None,
                       base_loss=loss[None].loss if loss else None, text=text, base_text=base)  # fmt: skip

    def _spectrum(self) -> Figure:
        s, k = self.top, self.rank.value
        kept = [v if i < k else 0.0 for i, v in enumerate(s.singular_values)]
        share = energy(s.singular_values)
        figure = figures.spectrum(kept, [float(share[min(i, k - 1)]) if k else 0.0 for i in range(len(kept))],
                                  list(s.singular_values), share.tolist(), needed=k)  # fmt: skip
        for trace in figure["data"]:  # the grey of this figure is the uncut update, not noise
            trace["name"] = trace["name"].replace("random, same norm", "uncut").replace("random", "uncut")
            trace["hovertemplate"] = trace["hovertemplate"].replace("random update of the same norm", "uncut")
        figure["layout"]["annotations"] = [
            a | {"text": "uncut"} if a["text"].startswith("random") else a for a in figure["layout"]["annotations"]
            if not a["text"].startswith("<b>")]  # fmt: skip
        return figure

    def _losses(self) -> Figure:
        seen = sorted((k, c) for k, c in self._seen.items() if c.loss is not None)
        base = next((c.base_loss for _, c in seen if c.base_loss is not None), None)
        line = ([k for k, _ in seen], [c.loss for _, c in seen if c.loss is not None])
        return charts.curves({"cut to k": line}, "rank k of the cut", "loss (nats a token)",
                             level=None if base is None else (f"base {base:.2f}", base))  # fmt: skip

    def _follow(self, change: Any = None) -> None:
        self.spectrum.put(self._spectrum())
        if self.rank.value not in self._seen:
            self.tell("measuring …")
        now = self.result()
        self.losses.put(self._losses())
        row = "<tr><td style='padding:2px 14px 2px 0;color:#475569;white-space:nowrap'>{}</td><td>{}</td></tr>"
        self.texts.value = "<table style='font-size:15px;line-height:1.35'>" + "".join(
            row.format(n, html.escape(t) or "<i>nothing</i>") for n, t in
            (("base", now.base_text), (f"cut to {now.rank}", now.text))) + "</table>"  # fmt: skip
        loss = "" if now.loss is None else f" Held-out loss {now.loss:.2f}; the base model has {now.base_loss:.2f}."
        self.tell(f"Rank <b>{now.rank}</b> of {self.most} keeps <b>{now.kept_energy:.1%}</b> of Σσ² over all"
                  f" matrices.{loss}")  # fmt: skip


class BudgetExplorer(Explorer):
    """Which matrices, which rank: trainable parameters, file size, memory of training, beside full fine-tuning."""

    def __init__(self, model: Any, spec: lc.LoraSpec | None = None) -> None:
        self.model, spec = model, spec or lc.LoraSpec()
        sites = lc.find_sites(model)
        names = [t for t in dict.fromkeys(s.target for s in sites) if t not in ("embed", "head")]
        most = min(min(s.out, s.in_) for s in sites if s.target in names)
        self.targets = {t: W.ToggleButton(value=t in spec.targets, description=t, layout=W.Layout(width="64px"))
                        for t in names}  # fmt: skip
        ranks = [r for r in (1, 2, 4, 8, 16, 32, 64, 128, 256) if r <= most]
        near = min(ranks, key=lambda r: abs(r - spec.rank))
        self.rank = W.SelectionSlider(options=ranks, value=near, description="rank r", layout=W.Layout(width="60%"))
        self.tasks = W.IntSlider(value=10, min=1, max=100, description="tasks", layout=W.Layout(width="60%"))
        self.memory = Chart(self._memory(), "Memory of training, by part", 330)
        super().__init__(W.HBox([W.Label("matrices"), *self.targets.values()]), self.rank, self.tasks, self.memory)
        for control in (*self.targets.values(), self.rank, self.tasks):
            control.observe(self._follow, "value")
        self._follow()

    @property
    def spec(self) -> lc.LoraSpec:
        """The choice as a LoraSpec; UserError while no matrix is chosen."""
        return lc.LoraSpec(targets=tuple(t for t, b in self.targets.items() if b.value), rank=self.rank.value)

    def result(self) -> lc.Budget:
        """The Budget of the choice, for a step of 512 tokens."""
        return lc.budget(self.model, self.spec)

    def _memory(self) -> Figure:
        b = self.result()
        names = ("weights", "gradients", "optimiser", "activations")
        return charts.bars({p: {"full fine-tuning": getattr(b.full_memory, p) / 1e6, "LoRA": getattr(b.memory, p) / 1e6}
                            for p in names}, "MB, for a step of 512 tokens", stacked=True)  # fmt: skip

    def _follow(self, change: Any = None) -> None:
        try:
            b, n = self.result(), self.tasks.value
        except UserError as error:
            self.tell(html.escape(str(error)))
            return
        self.memory.put(self._memory())
        copies, shared = b.storage(n)
        self.tell(f"<b>{b.trainable:,}</b> trainable parameters, {b.fraction:.2%} of the model; the file has"
                  f" {b.file_bytes / 1e6:.2f} MB. For {n} task{'s' if n > 1 else ''}: {copies / 1e6:,.0f} MB of full"
                  f" copies, or {shared / 1e6:,.0f} MB of one base and {n} adapter{'s' if n > 1 else ''}"
                  f" (<b>{shared / copies:.1%}</b>).")  # fmt: skip
