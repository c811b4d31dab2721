"""The sentences of Spectra: the word for each matrix with its rule, all measures of rank, and W0's part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from app.pages.words import count, plural, short
from lora_core.audit import RULES, MatrixAudit
from lora_core.beside import Beside
from lora_core.readings import Reading
from lora_core.spectra import Spectrum

MORE = (
    ("stable_rank", "effective (stable) rank", "Σσ²/σ₁²: how many directions as strong as the first make its norm"),
    ("participation", "participation ratio", "(Σσ²)²/Σσ⁴: how many equal directions would share the energy so"),
    ("entropy_rank", "entropy rank", "e to the entropy of the shares of Σσ²: counts small directions more"),
    ("roy_vetterli", "Roy–Vetterli rank", "the same with σ in place of σ²: counts small directions most"),
)  # fmt: skip


# what the audit's words come to, best first: {good, weak or collapsed: [the words]}
GRADES = {"good": ("full", "partly used"), "weak": ("dead",), "collapsed": ("collapsed",)}
SAME_DRAW = "Both began from the same draw of A (one seed), which alone makes φ large."


def rules() -> dict[str, str]:
    """What each word means."""
    return dict(RULES)


def grades() -> dict[str, str]:
    """{the audit's word: good, weak or collapsed}"""
    return {word: grade for grade, words in GRADES.items() for word in words}


def verdicts(found: Sequence[str]) -> str:
    """How many matrices are good, weak or collapsed, and by which word of the audit."""
    counts, parts = Counter(found), []
    for grade, words in GRADES.items():
        if n := sum(counts[w] for w in words):
            by = ", ".join(f"{counts[w]} {w}" for w in words if counts[w])
            parts.append(f"{n} {grade}" + (f" ({by})" if by != f"{n} {grade}" else ""))
    return f"By the use of their rank: {', '.join(parts)}." if parts else ""


def more(x: Spectrum, audit: MatrixAudit) -> list[list[str]]:
    """[name, value, what it is] of every measure, for the fold."""
    out = [[name, f"{getattr(x, key):.2f}", about] for key, name, about in MORE]
    out += [["90 % of the energy", plural(x.energy_90, "direction"), "the fewest that hold 90 % of Σσ²"],
            ["99 % of the energy", plural(x.energy_99, "direction"), "the fewest that hold 99 % of Σσ²"]]  # fmt: skip
    if audit.mp_edge is not None:
        above = f"{audit.mp_rank} above {short(audit.mp_edge)}"
        out.append(["above noise", above, "directions larger than what noise of this shape and median reaches"])
    out.append(["shape", f"{x.shape[0]}×{x.shape[1]}", x.path])
    return out


def beside(b: Beside) -> str:
    """What W0 has along the update's directions, in one sentence made from the three numbers of Table 7."""
    if not b.directions:
        return "This ΔW is zero: there are no directions to look for in W0."
    if b.along <= 1.5 * b.random:
        where = "no more than in random ones: ΔW adds directions that W0 does not stress"
    elif b.overlap < 0.5:
        where = f"{b.along / b.random:.1f} times what random ones have: directions that W0 has, but does not stress"
    else:
        where = "most of what its strongest have: ΔW turns up what W0 stresses already"
    return (f"Along its directions ΔW is {short(b.amplification)} times as large as W0. W0 has there {b.overlap:.0%}"
            f" of its {count(b.directions)} strongest, {where}.")  # fmt: skip


def along(name: str, found: Mapping[str, Mapping[str, float]]) -> str:
    """The sentence under the map of amplification or overlap, of {"layers.12.v": its numbers}."""
    moved = {m: b for m, b in found.items() if b["amplification"] > 0}
    if not moved:
        return "No matrix has moved: every ΔW is zero."
    top = max(moved, key=lambda m: moved[m][name])
    _, layer, target = top.split(".")
    most, middle = (sorted(b[name] for b in moved.values())[i] for i in (-1, len(moved) // 2))
    if name == "amplification":
        return (f"The middle update is {short(middle)} times as large as W0 along its own directions (section 7.3);"
                f" the most amplified is {target} of layer {layer}, {short(most)} times.")  # fmt: skip
    chance = sorted(b["random"] for b in moved.values())[len(moved) // 2]
    return (f"Along the middle update W0 has {middle:.1%} of what it has along its own strongest directions, along"
            f" random ones {chance:.1%}. The most is {most:.1%}, in {target} of layer {layer}.")  # fmt: skip


def inside(read: float, write: float, chance: float, k: int, j: int) -> str:
    """Where the update's first directions lie among W0's."""
    first = "ΔW's first direction" if k == 1 else f"ΔW's first {count(k)} directions"
    lies = "lies" if k == 1 else "lie"
    return (f"{first} {lies} to {read:.0%} (reading) and {write:.0%} (writing) within W0's strongest {j:,};"
            f" random ones to {chance:.0%}.")  # fmt: skip


def tokens(target: str, found: Sequence[Reading]) -> str:
    """How to read the tokens of a matrix, and whether they say more than chance."""
    how = {
        "q": "q reads the residual stream behind a norm: these tokens make it ask most",
        "k": "k reads the residual stream behind a norm: these tokens are noticed most",
        "v": "v reads the residual stream behind a norm, and what it gives is written through o",
        "gate": "gate reads the residual stream behind a norm: these tokens open it most",
        "up": "up reads the residual stream behind a norm: these tokens excite it most",
        "o": "o writes into the residual stream: these tokens become likelier; it reads what v gives",
        "down": "down writes into the residual stream: these tokens become likelier",
    }.get(target, "")
    if not found:
        return ""
    stand = sum(z > r.chance for r in found for ends in r.poles for p in ends for z in p.z)
    total = sum(len(p.z) for r in found for ends in r.poles for p in ends)
    return (f"{how}. Bold: {stand} of {total} stand out further than the first token of 19 in 20 random directions"
            " would.")  # fmt: skip


def alike(name: str, values: Sequence[float], k: int, chance: tuple[float, float], one: str, two: str) -> str:
    """How alike two adapters' updates of one matrix are over the layers, beside random directions."""
    if not values:
        return f"{one} and {two} share no update of {name}."
    middle, above = sorted(values)[len(values) // 2], sum(v > chance[1] for v in values)
    first = "first direction" if k == 1 else f"first {count(k)} directions"
    layers = "in its one layer" if len(values) == 1 else f"in {above} of {len(values)} layers"
    return (f"{name}: the {first} of {one} and of {two} are alike to φ = {short(middle, 2)} in the middle layer, random"
            f" ones to {short(chance[0], 2)}; {layers} more than 19 in 20 random pairs.")  # fmt: skip


def overlay(name: str, x: Spectrum, y: Spectrum, first: float | None) -> str:
    """What the second spectrum in the picture says."""
    top, other = max(x.singular_values, default=0.0), max(y.singular_values, default=0.0)
    text = f"{name}: σ₁ = {short(other)}"
    if top > 0 and other > 0:
        text += ", as here" if abs(other / top - 1) < 0.005 else f", {other / top:.2g} times that here"
    text += f"; {plural(y.energy_90, 'direction')} for 90 %"
    if first is not None:
        text += f"; its first reads the same to φ = {short(first, 2)} (random: {short(1 / x.shape[1], 2)})"
    return text + "."
