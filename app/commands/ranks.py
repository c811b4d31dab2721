"""`lora-lab audit` and `compress`: how much of each rank is used, and a smaller adapter."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.commands import opening
from app.commands.adapters import AdapterFolder, Model, info_of, load
from app.commands.options import Device, Dtype, adapter_folder
from app.commands.output import Json, Result, number, say, size, table
from lora_core.errors import UserError

if TYPE_CHECKING:
    from lora_core.cuts import Cuts


def audit(
    adapter: AdapterFolder,
    data: Annotated[Path | None, typer.Option(help="Held-out rows: measure the loss of cuts to rank 0, 1, 2 …")] = None,
    task: Annotated[str | None, typer.Option(help="Or the held-out rows of a built-in task.")] = None,
    model: Model = None,
    template: Annotated[str | None, typer.Option(help="Instead of the one that the adapter was trained with.")] = None,
    rows: Annotated[int, typer.Option(help="Measure on this many rows, evenly spread; 0 for all.")] = 0,
    max_tokens: Annotated[int | None, typer.Option(help="Longer rows are cut; as in training unless told.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> Result:
    """How much of each rank is used, and what rank would have been enough: by the spectra, which needs no model and no
    torch, or with --data or --task by the measured loss of cuts. Of DoRA, s·B·A is looked at. Takes what `spectra`
    takes; what is measured must be a folder in PEFT's format."""
    from lora_core.audit import ENOUGH, RULES, audit_spectra
    from lora_core.audit import audit as of
    from lora_core.files import read_adapter

    if data is not None and task is not None:
        raise UserError("give --data FILE or --task NAME, not both")
    if rows < 0:
        raise UserError(f"rows is {rows}; it is a number of rows, or 0 for all")
    folder, about = adapter_folder(adapter), {}
    if opening.foreign(folder):
        if data is not None or task is not None:
            raise UserError(f"{folder} is no folder in PEFT's format, so nothing can be measured with it on a model")
        with opening.opened(folder, model) as (file, theirs):
            found, about = audit_spectra(theirs, dense=file.difference is not None), opening.about(file)
    else:
        stored = read_adapter(folder)
        found, about = of(stored), {"dora": stored.dora, "model": model or stored.base}
    value: dict[str, Any] = {**found.to_dict(), "suggested_by": "spectrum", "spectrum_rank": found.suggested_rank,
                             "words": dict(Counter(m.word for m in found.matrices)), "rules": RULES,
                             **about}  # fmt: skip
    head = ["matrix", "rank", "stable", "90 %", "95 %", "99 %", "above noise", "edge", "largest σ", "used", ""]
    lines = [[m.path, str(m.rank), number(m.stable_rank, 2), str(m.energy_rank_90), str(m.energy_rank_95),
              str(m.energy_rank_99), str(m.mp_rank), "-" if m.mp_edge is None else f"{m.mp_edge:.3g}",
              f"{max(m.singular_values):.3g}", f"{m.used:.0%}", m.word] for m in found.matrices]  # fmt: skip
    text = table([head, *lines], right=range(1, 10)) + "\n\n" + "\n".join(
        f"{n} {word}: {RULES[word]}" for word, n in value["words"].items())  # fmt: skip
    text += (f"\n\nrank {found.suggested_rank} keeps {found.kept_energy[found.suggested_rank]:.1%} of Σσ² over all"
             f" matrices, the least that keeps {ENOUGH:.0%}")  # fmt: skip
    if data is not None or task is not None:
        cuts, some = measured(adapter, data, task, model, template, rows, max_tokens, dtype, device)
        value |= {**cuts.to_dict(), "suggested_by": "loss", **some}
        figures = [n for n in cuts.base if n != "loss"]
        curve = [["cut to", "loss", "of the gain", *figures]]
        for k, v in cuts.cuts.items():
            share = f"{(cuts.base['loss'] - v['loss']) / cuts.gain:.1%}" if cuts.gain > 0 else "-"
            curve.append([f"rank {k}", number(v["loss"], 4), share, *(number(v[n]) for n in figures)])
        text += "\n\n" + table(curve, right=range(1, len(curve[0]))) + "\n\n"
        text += (f"rank {cuts.suggested_rank} is enough: the least within 1 % of the gain of {cuts.gain:.4g} nats, on"
                 f" {some['rows']:,} held-out rows" if cuts.gain > 0 else
                 f"on these {some['rows']:,} rows the adapter gains nothing: rank 0 is as good")  # fmt: skip
    return Result(value=value, text=text, json=json)


def measured(adapter: str, data: Path | None, task: str | None, model: str | None, template: str | None, rows: int,
             max_tokens: int | None, dtype: str, device: str) -> tuple[Cuts, dict[str, Any]]:  # fmt: skip
    """The cuts' figures, and on what they were measured."""
    from lora_core.tasks import load_held_out, load_task

    if task is not None:
        load_task(task)  # a wrong name is told before a model is loaded
    else:
        load_held_out(str(data))
    a, tokenizer = load(adapter, model, dtype, device)
    from lora_core import Adapter, CausalLM, Classification, Objective, Preference, measure_cuts
    from lora_core.evaluate import spread
    from lora_core.objective import choose, is_classifier
    from lora_core.preference import BETA

    settings = dict(a.info.get("config") or {})
    longest = max_tokens or int(settings.get("max_tokens", 256))
    classifies = is_classifier(a.model)
    held = (load_task(task, seed=int(settings.get("seed", 0))) if task is not None
            else load_held_out(str(data), template=template or a.info.get("template") or None,
                               tokenizer=None if classifies else tokenizer, max_tokens=longest))  # fmt: skip
    for note in held.notes:
        say(note)
    chosen = spread(held.test, rows or len(held.test))
    kind = choose(classifies, held.test)

    def objective(cut: Adapter) -> Objective:
        if kind == "classify":
            return Classification(cut.model, tokenizer, max_tokens=longest)
        if kind == "preference":
            return Preference(cut, tokenizer, held.template, longest, beta=settings.get("beta", BETA))
        return CausalLM(cut.model, tokenizer, held.template, longest)

    cuts = measure_cuts(a, objective, chosen, tell=lambda k, loss: say(f"cut to rank {k}: loss {loss:.4f}"))
    return cuts, {"objective": kind, "rows": len(chosen), "of": len(held.test), "model": info_of(a).name}


def compress(
    adapter: AdapterFolder,
    out: Annotated[Path, typer.Option(help="The folder to write: a smaller adapter in PEFT's format.")],
    rank: Annotated[int | None, typer.Option(help="Every matrix keeps this many directions.")] = None,
    energy: Annotated[float | None, typer.Option(help="Every matrix keeps this share of its Σσ²: 0.95.")] = None,
    mb: Annotated[float | None, typer.Option(help="The file has at most this many MB, spent where Σσ² is.")] = None,
    json: Json = False,
) -> Result:
    """A smaller adapter: the best cut of every ΔW, each with its own rank; what was trained itself is carried over.
    The file is read back and compared. Needs no model and no torch; of DoRA, s·B·A is cut."""
    from lora_core.compress import compress as cut

    c = cut(adapter_folder(adapter), out, rank=rank, energy=energy, mb=mb)
    count = Counter(c.ranks.values())
    ranks = ", ".join(f"{count[k]} of rank {k}" if k else f"{count[k]} left out" for k in sorted(count, reverse=True))
    text = (f"{out}\n{len(c.ranks)} matrices: {ranks}\n{size(c.before_bytes)} before, {size(c.file_bytes)} now;"
            f" {c.kept_energy:.2%} of Σσ² kept\nread back, ΔW differs by {c.difference:.3%} of its norm from the whole,"
            f" and by {c.rounding:.1g} from the exact cut")  # fmt: skip
    return Result(value=c.to_dict(), text=text, json=json)
