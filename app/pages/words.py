"""The sentences under the pictures, made from the numbers; and the words of the paper, each in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from app.runs.run import Run, difference_sentence
from lora_core.effect import Effect

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

# (word, what it means in one line); sections are those of the LoRA paper, arXiv 2106.09685
GLOSSARY = (
    ("W0", "a matrix of the model as it was; it stays frozen (section 4.1)"),
    ("ΔW", "what training adds to a matrix: W = W0 + ΔW, and here ΔW = s·B·A (section 4.1)"),
    ("A and B", "the two thin matrices that are trained: A is r×in, B is out×r, and B starts at 0 (section 4.1)"),
    ("rank r", "how many directions ΔW may have: B has r columns, A has r rows (section 4.1)"),
    ("α", "ΔW is multiplied by s = α/r, so that r can change without a new learning rate (section 4.1)"),
    ("q k v o", "the four matrices of attention: query, key, value and output (section 4.2)"),
    ("gate up down", "the matrices of the MLP that follows attention in each layer (section 4.2)"),
    ("loss", "mean surprise at the right next token, in nats: e to the minus loss is its typical probability"),
    ("held out", "rows that were never trained on"),
    ("‖ΔW‖", "the size of an update: the root of the sum of its squared entries (Frobenius norm, section 7.3)"),
    ("singular values σ", "how strongly ΔW acts along each of its directions, largest first (section 7)"),
    ("energy", "the share of Σσ² that the first directions hold; Σσ² is ‖ΔW‖ squared"),
    ("effective rank", "Σσ²/σ₁², the stable rank: how many directions carry the update, counted softly"),
    ("amplification", "‖ΔW‖/‖UᵀW0V‖: how much larger ΔW is than what W0 has along the same directions (section 7.3)"),
    ("overlap with W0", "‖UᵀW0V‖ over the most that is possible: how far ΔW's directions are W0's strongest ones"),
    ("φ", "how much of the span of some directions lies in that of others: 1 the same, 0 none of it (section 7.2)"),
    ("random, same norm", "a product of random B and A of the same shape, rank and ‖ΔW‖: what no learning looks like"),
    ("BLEU", "how many word sequences a text shares with what people wrote, 0 to 100"),
)


def count(n: int) -> str:
    """A number as a word where that is short: three, 14."""
    return NUMBERS[n] if 0 <= n < len(NUMBERS) else f"{n:,}"


def plural(n: int, one: str, many: str | None = None) -> str:
    return f"{count(n)} {one if n == 1 else many or one + 's'}"


def short(x: float, digits: int = 3) -> str:
    """At most three digits that say something: 0.00312, 1.67, 14.2, 5,342."""
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    x = float(f"{x:.{digits}g}") if abs(x) < 1000 else x  # 99.96 is 100, not 100.0
    if abs(x) >= 100:
        return f"{x:,.0f}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(x))))
    return f"{x:.{min(places, 8)}f}"


def duration(seconds: float) -> str:
    """8 s, 2 min 10 s, 1 h 5 min."""
    s = max(0, round(seconds))
    if s < 100:
        return f"{s} s"
    m, s = divmod(s, 60)
    if m < 60:
        return f"{m} min {s} s" if s and m < 10 else f"{m + (s >= 30)} min"
    return f"{m // 60} h {m % 60} min"


def training(run: Run) -> str:
    """What a run did, from its own numbers."""
    took = duration(float(run.result["train_s"])) if run.result.get("train_s") else ""
    if run.result.get("effect"):
        found, told = Effect.from_dict(run.result["effect"]), score(run.score)
        text = found.sentence(score=(told["name"], told["base"], told["adapted"]) if told else None, took=took)
        return {"stopped": "Stopped early: "}.get(run.status, "") + text
    if run.base_loss is None or run.loss is None or not run.step:
        return ""
    ended = {"stopped": "stopped early, ", "diverged": "diverged, ", "interrupted": "interrupted, "}.get(run.status, "")
    first = f"{ended}{run.step:,} {'step' if run.step == 1 else 'steps'}"
    if took:
        first += f" in {took}"
    first = first[0].upper() + first[1:]
    losses = f"{first} took the held-out loss from {run.base_loss:.2f} to {run.loss:.2f}"
    if run.result.get("objective") == "preference":  # log 2 means that both answers are as dear as they were
        return f"{losses}, that of pairs of answers; without the adapter it is log 2, 0.69."
    one = "label" if run.result.get("objective") == "classify" else "token"
    ratio = math.exp(run.base_loss - run.loss)
    if run.loss < run.base_loss - 0.005:
        effect = f"each held-out {one} became {times(ratio)} as likely"
    elif run.loss > run.base_loss + 0.005:
        effect = f"each held-out {one} became {times(1 / ratio)} less likely"
    else:
        effect = f"held-out {one}s are as likely as before"
    return f"{losses}: {effect}."


def under_way(step: int, steps: int, recent: float, base: float | None) -> str:
    """Where a run is, by the smoothed loss of its last steps."""
    text = f"After {step:,} of {steps:,} steps the training loss is about {recent:.2f}"
    return text + (f"; the base model has {base:.2f} on held-out rows." if base is not None else ".")


def growth(values: Mapping[str, Sequence[float | None]]) -> str:
    """Where an update has grown, by the strip of the layers."""
    cells = [(v, name, layer) for name, row in values.items() for layer, v in enumerate(row) if v is not None]
    if not cells or max(cells)[0] <= 0:
        return "ΔW = 0 at the start: B is zero, so the outputs are the base model's."
    top, name, layer = max(cells)
    middle = sorted(v for v, _, _ in cells)[len(cells) // 2]
    text = f"ΔW is largest in {name} of layer {layer}, ‖ΔW‖ = {short(top)}"
    return text + (f"; the middle matrix has {short(middle)}." if len(cells) > 2 else ".")


def times(x: float) -> str:
    """A ratio that can be pictured: 4.3 times, 120 times, more than 10,000 times."""
    return f"{x:.2g} times" if x < 10 else f"{x:,.0f} times" if x < 10_000 else "more than 10,000 times"


def beside(run: Run, other: Run, name: str) -> str:
    """One sentence of difference to the run that is drawn behind."""
    text = f"Behind it: {name}, {difference_sentence(other, run)}"
    if run.loss is not None and other.loss is not None and run.status in ("done", "stopped"):
        gap = other.loss - run.loss
        text += f"; it ended at {other.loss:.2f}"
        text += ", the same." if abs(gap) < 0.005 else f", {abs(gap):.2f} {'above' if gap > 0 else 'below'}."
    else:
        text += "." if other.loss is None else f"; it ended at {other.loss:.2f}."
    return text


def heat(values: Mapping[str, Sequence[float | None]], measure: str) -> str:
    """Where the update is, from the map's numbers."""
    cells = [(v, name, layer) for name, row in values.items() for layer, v in enumerate(row) if v is not None]
    if not cells:
        return ""
    top = max(cells)
    if top[0] <= 0:
        return "No matrix has moved: every ΔW is zero."
    mean = {name: sum(v for v, n, _ in cells if n == name) / sum(n == name for _, n, _ in cells) for name in values}
    if measure == "norm":
        text = f"The largest update is in {top[1]} of layer {top[2]} (‖ΔW‖ = {short(top[0])})"
        low = min(cells)
        if len(cells) > 1 and low[0] > 0:
            text += f", {top[0] / low[0]:.1f} times the smallest ({low[1]} of layer {low[2]})"
        return text + "."
    values_ = sorted(v for v, _, _ in cells)
    middle = values_[len(values_) // 2]
    text = f"Half of the updates act along fewer than {middle:.1f} directions"
    if len(mean) > 1:
        ordered = sorted(mean, key=lambda n: mean[n])
        text += f"; on average {ordered[0]} needs the fewest ({mean[ordered[0]]:.1f}) and {ordered[-1]} the most"
        text += f" ({mean[ordered[-1]]:.1f})"
    return text + "."


def spectrum(needed: int, random_needed: int, rank: int) -> str:
    """How concentrated an update is, beside a random one."""
    if needed == 0:
        return "This ΔW is zero: training has not moved this matrix."
    if rank == 1:
        return "At rank 1 there is only one direction: it holds all of this update, as it would of a random one."
    holds = "direction holds" if needed == 1 else "directions hold"
    text = f"{count(needed)} {holds} 90 % of this update; a random update of the same norm would need "
    text = text[0].upper() + text[1:]
    return text + ("as many." if random_needed == needed else f"{count(random_needed)}.")


def status(run: Run, stage: str | None) -> str:
    """The live line: "run 14 is training: step 12 of 60"."""
    name = "the recorded run" if run.recorded else f"run {run.id}"
    if run.recorded:
        return f"recorded run: {run.step:,} steps, made by LoRA Lab's own command"
    if run.status == "queued":
        if run.position and run.position > 1:
            return f"{name} waits: place {run.position} in the queue"
        return f"{name} waits: {stage}" if stage else f"{name} waits for its turn"
    if run.status == "running":
        if stage and not (run.step and stage == "training"):
            return f"{name}: {stage}"
        return f"{name} is training: step {run.step:,} of {run.steps:,}"
    said = {"done": "done", "stopped": f"stopped after step {run.step:,} of {run.steps:,}, adapter kept"}
    text = said.get(run.status, run.status)
    if run.status == "interrupted":
        text = f"interrupted after step {run.step:,} of {run.steps:,}"
    return f"{name}: {text}"


def score(values: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The headline score of both models, as text: {"name", "base", "adapted", "rows"}."""
    if not values or not values.get("base") or not values.get("adapted"):
        return None
    name = str(values["name"])
    both = [values[side].get(name) for side in ("base", "adapted")]
    if any(v is None for v in both):
        return None
    whole = name in ("BLEU", "chrF")
    text = [f"{v:.0f}" if whole else f"{100 * v:.0f} %" for v in both]
    return {"name": name, "base": text[0], "adapted": text[1], "rows": values.get("rows")}
