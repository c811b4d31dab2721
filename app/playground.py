"""Play in a notebook: the very modules that the page's first tab runs, as an anywidget.

p = Playground("bzero", r=2)
p                      # plays in the browser, also while the kernel is busy
p.result().loss[-1]    # the same training again, in numpy
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import anywidget
import numpy as np
import traitlets

from lora_core.errors import UserError, unknown
from lora_core.toy import Film, Toy, swaps, train

STATIC = Path(__file__).parent / "static"
# What the module's presets set, and how long they are; a test holds the two together. alpha None: α = r.
PRESETS: dict[str, tuple[int, dict[str, Any]]] = {
    "first": (120, {"alpha": None}),
    "bzero": (150, {"alpha": None, "std": 0.2}),
    "scale": (100, {"opt": "adam", "std": 0.2, "eps": 0.0}),
    "lowrank": (120, {"alpha": None, "r": 2, "rstar": 8, "spectrum": "flat"}),
    "full": (600, {"alpha": None, "r": 16, "rstar": 16, "spectrum": "linear"}),
    "noise": (600, {"alpha": None, "r": 3, "inputs": "samples", "std": 0.05, "rate": 0.03}),
    "swap": (1000, {"alpha": None, "prec": "bf16", "tasks": "fresh"}),
    "cut": (800, {"alpha": None, "r": 8, "rstar": 8, "spectrum": "linear", "inputs": "stretched", "rate": 0.03}),
}
WORDS = {"rule": ("r", "root", "one"), "init": ("A", "B", "both", "none"), "opt": ("sgd", "adam"),
         "spectrum": ("halving", "flat", "linear"), "inputs": ("plain", "stretched", "samples"),
         "prec": ("bf16", "fp32", "copy"), "tasks": ("fresh", "two")}  # fmt: skip
RANGES: dict[str, tuple[float, float]] = {"r": (1, 16), "rstar": (1, 16), "seed": (0, 99), "alpha": (0.25, 64),
                                          "rate": (0.002, 2), "std": (0.005, 1), "noise": (0.05, 2)}  # fmt: skip
WHOLE = ("r", "rstar", "seed")


def module() -> str:
    """The toy as one ES module, as a notebook wants it: the arithmetic, then the questions and the picture."""
    arithmetic, picture = ((STATIC / name).read_text(encoding="utf-8") for name in ("toy.js", "playground.js"))
    return arithmetic + re.sub(r'^(?:import \{.*\}|export \*) from "\./toy\.js";\n', "", picture, flags=re.M)


def scoped_css() -> str:
    """The page's tokens and rules for the parts, so that they hold within `.ll-lab` and nowhere else in a notebook."""
    text = "".join((STATIC / name).read_text(encoding="utf-8") for name in ("theme.css", "parts.css"))
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    kept = []
    for head, body in re.findall(r"([^{}]+)\{((?:[^{}]|\{[^{}]*\})*)\}", text):
        head = head.strip()
        if head.startswith("@media"):
            inner = "".join(_rule(h, b) for h, b in re.findall(r"([^{}]+)\{([^{}]*)\}", body))
            kept.append(f"{head} {{ {inner} }}\n" if inner else "")
        elif not head.startswith("@"):
            kept.append(_rule(head, body))
    return "".join(kept)


def _rule(head: str, body: str) -> str:
    """One rule with its selectors under `.ll-lab`; nothing of those that speak of the page around the parts."""
    selectors = []
    for s in (s.strip() for s in head.split(",")):
        if s == ":root":
            selectors.append(".ll-lab")
        elif s == ".dark":
            selectors.append(".ll-lab.dark")
        elif s.startswith(".dark "):
            selectors.append(f".ll-lab{s}")
        elif s.startswith(".ll"):
            selectors.append(f".ll-lab {s}")
    return f"{', '.join(selectors)} {{{body}}}\n" if selectors else ""


class Playground(anywidget.AnyWidget):
    """LoRA on one matrix of 16 × 24, trained in the browser while one watches.

    preset  which of the eight questions: first bzero scale lowrank full noise swap cut
    t       a step to begin at, without a question; hide: dials that are not shown
    dials   what differs from the preset: r alpha rule init std opt rate rstar spectrum inputs noise seed, and for swap
            prec and tasks

    Settings alone go to and fro: `result()` computes the arrays again, in Python. Raises UserError for a preset, a
    dial or a value that there is not.
    """

    _esm = module()
    _css = scoped_css()
    query = traitlets.Dict().tag(sync=True)

    def __init__(
        self, preset: str = "first", *, t: int | None = None, hide: tuple[str, ...] = (), **dials: Any
    ) -> None:
        if preset not in PRESETS:
            raise unknown("preset", preset, PRESETS)
        query: dict[str, str] = {"p": preset}
        for name, value in dials.items():
            query[name] = _checked(name, value, preset)
        if t is not None:
            if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t <= PRESETS[preset][0]:
                raise UserError(f"t is {t!r}; it is a step from 0 to {PRESETS[preset][0]}")
            query["t"] = str(t)
        if hide:
            query["hide"] = ",".join(hide)
        super().__init__(query=query)

    @property
    def preset(self) -> str:
        return str(self.query.get("p", "first"))

    @property
    def settings(self) -> dict[str, Any]:
        """All dials as they stand, numbers as numbers; alpha is that of the training, also where it follows r."""
        values = {f: getattr(Toy, f) for f in Toy.__dataclass_fields__} | PRESETS[self.preset][1]
        for name, text in self.query.items():
            if name in WORDS:
                values[name] = text
            elif name in RANGES:
                values[name] = None if text == "r" else int(text) if name in WHOLE else float(text)
        values["alpha"] = float(values["r"] if values["alpha"] is None else values["alpha"])
        return values

    @property
    def toy(self) -> Toy:
        """The settings of the training, as lora_core.toy takes them."""
        return Toy(**{k: v for k, v in self.settings.items() if k not in ("prec", "tasks")})

    def result(self) -> Film | list[np.ndarray]:
        """The training that is shown, every step of it; of "swap" W after 0, 1, … adapters came and went."""
        steps, now = PRESETS[self.preset][0], self.settings
        if self.preset != "swap":
            return train(self.toy, steps)
        if now["prec"] == "copy":  # what was kept is put back
            return swaps(self.toy, 0) * (steps + 1)
        dtype: Literal["bf16", "fp32"] = now["prec"]
        return swaps(self.toy, steps, dtype=dtype, fresh=now["tasks"] == "fresh")


def _checked(name: str, value: Any, preset: str) -> str:
    """A dial's value as the module's address has it."""
    if name not in WORDS and name not in RANGES or (name in ("prec", "tasks")) > (preset == "swap"):
        raise unknown("dial", name, [d for d in (*RANGES, *WORDS) if preset == "swap" or d not in ("prec", "tasks")])
    if name in WORDS:
        if value not in WORDS[name]:
            raise unknown(f"value for {name}", str(value), WORDS[name])
        return str(value)
    if name == "alpha" and value == "r":
        return "r"
    low, high = RANGES[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or (
            name in WHOLE and value != int(value)):  # fmt: skip
        kind = "a whole number" if name in WHOLE else "a number"
        raise UserError(f"{name} is {value!r}; it is {kind} from {low:g} to {high:g}")
    return str(int(value)) if name in WHOLE else repr(float(value))
