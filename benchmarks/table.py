"""README's table of measurements, made from the last line of each file in results/.

python -m benchmarks.table          write it between README's marks
python -m benchmarks.table --check  exit 1 where README says something else
"""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks.kit import RESULTS, ROOT

BEGIN, END = "<!-- benchmarks: from benchmarks/results -->", "<!-- end of benchmarks -->"


def lines() -> list[dict[str, Any]]:
    """The newest line of every row."""
    files = sorted(RESULTS.glob("*.jsonl"))
    newest = [json.loads(f.read_text().splitlines()[-1]) for f in files]
    return [line for line in newest if "ratio" in line]


def chip_of(line: dict[str, Any]) -> str:
    """The processor that a row was measured on, with what of its instructions matters for products; or the GPU."""
    machine = line["machine"]
    return machine.get("gpu") or f"{machine['chip']} ({', '.join(machine['isa'])})"


def table() -> str:
    rows = lines()
    if not rows:
        return "No measurement yet: `make bench`."
    out = ["| what | on | ours | beside | ratio (least to most) | to reach | |",
           "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    chips = {chip: f"{chr(97 + i)}" for i, chip in enumerate(sorted({chip_of(r) for r in rows}))}
    for r in rows:
        ours, peer, ratio = r["sides"][r["ours"]], r["sides"][r["peer"]], r["ratio"]
        sign = "≥" if r["at_least"] else "≤"
        out.append(
            f"| {r['what']} | {chips[chip_of(r)]} | {ours['median']:.3g} {r['unit']} | "
            f"{r['peer']} {peer['median']:.3g} {r['unit']} | "
            f"{ratio['median']:.3g} ({ratio['min']:.3g} to {ratio['max']:.3g}) | {sign} {r['reach']:g} | "
            f"{'yes' if r['reached'] else 'no'} |"
        )
    note = ("Medians, on " + "; ".join(f"{letter}: {chip}" for chip, letter in chips.items())
            + ". Trainer with PEFT ran in whichever of float32 and bfloat16 is faster there.")  # fmt: skip
    return "\n".join([*out, "", note, *growth()])


def growth() -> list[str]:
    """Where the laws of docs/growth.svg hold, in words."""
    words = {"rank": "rank", "length": "tokens in a row", "size": "parameters"}
    said = []
    for f in [RESULTS / "growth.jsonl"] if (RESULTS / "growth.jsonl").exists() else []:
        newest = {line["row"]: line for line in map(json.loads, f.read_text().splitlines())}
        for row, g in newest.items():
            shares = [m / w for m, w in zip(g["peak_bytes"], g["foretold_bytes"], strict=True)]
            law = " and ".join(f"parts from its law at {v} ({why})" for v, why in g["breaks"]) or "follows its law"
            said.append(f"With {words[row.split()[1]]} ({g['at'][0]} to {g['at'][-1]}) a step's time {law}; "
                        f"the peak of memory is {min(shares):.2f} to {max(shares):.2f} of the budget's.")  # fmt: skip
    return ["", "![How a step's cost grows](docs/growth.svg)", "", *said] if said else []


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    new = f"{head}{BEGIN}\n{table()}\n{END}{tail}"
    if "--check" in sys.argv:
        return int(new != text)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
