"""The options that describe an adapter, and how their texts become a LoraSpec."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lora_core.errors import UserError
from lora_core.spec import LoraSpec

Targets = Annotated[str, typer.Option(help="What to adapt, with commas: q k v o gate up down embed head norm bias.")]
Rank = Annotated[int, typer.Option(help="Rank r of every update.")]
Alpha = Annotated[float, typer.Option(help="Alpha; the update is scaled by alpha/r.")]
Layers = Annotated[str, typer.Option(help="Layers to adapt: all, or numbers and ranges such as 0,1,5-8.")]
Scaling = Annotated[str, typer.Option(help="alpha/r as in the paper, or alpha/sqrt(r).")]
Init = Annotated[str, typer.Option(help="How A begins: gaussian, kaiming, orthogonal, pissa or gradient.")]
Dropout = Annotated[float, typer.Option(help="Probability with which an input of A is dropped in training.")]
TrainA = Annotated[bool, typer.Option("--train-a/--freeze-a", help="Train A too, or B alone (LoRA-FA).")]
Dora = Annotated[bool, typer.Option("--dora", help="DoRA: the rows' lengths are trained apart from their directions.")]
Mask = Annotated[float, typer.Option(help="Above 0, rank directions are pulled to zero with this strength.")]
Full = Annotated[str, typer.Option(help="Modules to train in full, with commas; head is a classifier's.")]
Bottleneck = Annotated[int, typer.Option(help="Units of adapter layers behind attention and MLP; 0 for none.")]
Prefix = Annotated[int, typer.Option(help="Trained keys and values before the text, in every layer; 0 for none.")]
Method = Annotated[str, typer.Option(help="Instead of the options that describe an adapter: full, last-layer, bitfit,"
                                     " bottleneck, prefix, lora or lora-prefix; with a size as in bottleneck:16.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, or auto: what this machine is faster with.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps, or auto.")]


def spec_of(targets: str, rank: int, alpha: float, layers: str, scaling: str, init: str, dropout: float,
            train_A: bool = True, dora: bool = False, mask: float = 0.0, full: str = "", bottleneck: int = 0,
            prefix: int = 0, method: str = "") -> LoraSpec:  # fmt: skip
    """The LoraSpec that the options mean, or the method's; UserError for a value that is not possible."""
    if method:
        from lora_core.methods import method_spec

        name, _, size = method.partition(":")
        if size and not size.isdigit():
            raise UserError(f"method is {method!r}; a size is a whole number, as in bottleneck:16")
        return method_spec(name, int(size) if size else None)
    options: dict[str, Any] = {"scaling": scaling, "init": init}
    return LoraSpec(targets=tuple(targets.split(",")), rank=rank, alpha=alpha, layers=layers_of(layers),
                    dropout=dropout, train_A=train_A, dora=dora, mask=mask, full=tuple(full.split(",")) if full else (),
                    bottleneck=bottleneck, prefix=prefix, **options)  # fmt: skip


def layers_of(text: str) -> Literal["all"] | tuple[int, ...]:
    """ "all", or the numbers in a text such as "0,1,5-8"."""
    if text.strip() == "all":
        return "all"
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*", part)
        if not match or match[2] and int(match[2]) < int(match[1]):
            raise UserError(f"layers are 'all', or numbers and ranges such as 0,1,5-8; given '{text}'")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(found)


def adapter_folder(given: str) -> Path:
    """The folder of an adapter: a path, or the number of a run ("14", "run 14") whose adapter is meant."""
    folder = Path(given).expanduser()
    number = re.fullmatch(r"(?:run[ -]?)?(\d{1,9})", given.strip())
    if folder.exists() or not number:
        return folder  # whether an adapter is in it is for its reader to say
    from app.runs.store import RunStore

    run = RunStore().get(int(number[1]))
    if run.adapter is None:
        raise UserError(f"run {run.id} ({run.status}) has no adapter")
    return run.adapter
