"""`lora-lab models` and `lora-lab budget`: what can be loaded, and what an adapter would cost."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from app.commands.options import (
    Alpha,
    Bottleneck,
    Dora,
    Dtype,
    Full,
    Init,
    Layers,
    Mask,
    Method,
    Prefix,
    Rank,
    Targets,
    TrainA,
    spec_of,
)
from app.commands.output import Json, Result, say, size, table


def models(
    fetch: Annotated[list[str] | None, typer.Option(help="Bring this model onto this machine now.")] = None,
    json: Json = False,
) -> Result:
    """What models can be loaded by name, and where each would come from."""
    from lora_core.home import home_path
    from lora_core.models import DEFAULT, find, registry

    for name in fetch or ():
        folder, known_as, _ = find(name)
        say(f"{known_as} is in {folder}")
    entries = registry()
    rows = [("name", "parameters", "comes from", "here", "")]
    rows += [(e.name, f"{e.parameters / 1e6:,.0f} M", "a package" if e.source == "embedded" else "the hub",
              "yes" if e.cached else "no", e.about) for e in entries]  # fmt: skip
    text = f"{table(rows, right=(1,))}\n\nA folder with config.json and safetensors works too, and so does any hub id."
    value = {"models": [e.to_dict() for e in entries], "default": DEFAULT, "home": str(home_path())}
    return Result(value=value, text=text, json=json)


def budget(
    model: Annotated[str, typer.Argument(help="A model's name, folder or hub id.")],
    targets: Targets = "q,v",
    rank: Rank = 8,
    alpha: Alpha = 16,
    layers: Layers = "all",
    init: Init = "gaussian",
    train_A: TrainA = True,
    dora: Dora = False,
    mask: Mask = 0.0,
    full: Full = "",
    bottleneck: Bottleneck = 0,
    prefix: Prefix = 0,
    method: Method = "",
    labels: Annotated[int, typer.Option(help="Labels of a classifier; 0 for the model as it is.")] = 0,
    tokens: Annotated[int, typer.Option(help="Tokens of a training step, for the memory that it takes.")] = 512,
    dtype: Dtype = "auto",
    json: Json = False,
) -> Result:
    """What an adapter costs before it is trained: parameters, file, memory; against full fine-tuning."""
    spec = spec_of(targets, rank, alpha, layers, "alpha/r", init, 0.0, train_A, dora, mask, full, bottleneck,
                   prefix, method)  # fmt: skip
    from lora_core import budget as price
    from lora_core.errors import UserError
    from lora_core.models import empty_model

    if not 1 <= tokens <= 10**9:
        raise UserError(f"tokens is {tokens}; a training step has at least one")
    if labels and not 2 <= labels <= 10**6:
        raise UserError(f"labels is {labels}; a classifier needs at least two")
    b = price(empty_model(model, dtype=dtype, labels=labels or None), spec, tokens=tokens)
    counts = {n: getattr(b, n) for n in ("factors", "head", "direct", "magnitudes", "gates", "added")}
    lora, whole = asdict(b.memory), asdict(b.full_memory)
    rows = [
        ("trainable", f"{b.trainable:,}", f"{b.fraction:.2%} of {b.total:,}, in {b.matrices} matrices"),
        *((f"  {n}", f"{count:,}", "") for n, count in counts.items() if count not in (0, b.trainable)),
        *((f"  for {t}", f"{n:,}", "") for t, n in b.per_target.items()),
        *([("tied", f"{b.tied:,}", "shared by modules, counted once")] if b.tied else []),
        ("adapter file", size(b.file_bytes), f"the model's own file: {size(b.full_bytes)}"),
        ("training memory", size(b.train_bytes), f"full fine-tuning: {size(b.full_train_bytes)}"),
        *((f"  {n}", size(lora[n]), size(whole[n])) for n in lora),
        ("work for a token", f"{b.flops_per_token / 1e6:,.0f} MFLOP",
         f"full fine-tuning: {b.full_step_flops / tokens / 1e6:,.0f} MFLOP"),
    ]  # fmt: skip
    value = {"model": model, "spec": spec.to_dict(), **b.to_dict()}
    return Result(value=value, text=table(rows, right=(1,)), json=json)
