"""`lora-lab experiment …`: the paper's questions, their stored answers, and how to answer them here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.commands.output import Json, duration, table
from app.commands.output import Result as Answer
from lora_core.errors import UserError

if TYPE_CHECKING:
    from lora_core.experiments import Experiment, Result

cli = typer.Typer(help="The paper's questions, answered by experiment: list, show, run.", no_args_is_help=True,
                  rich_markup_mode=None)  # fmt: skip
Name = Annotated[str, typer.Argument(metavar="NAME", help="An experiment; `lora-lab experiment list` names them.")]


@cli.command("list")
def list_(json: Json = False) -> Answer:
    """All questions, with the verdicts of the stored results and of those made here."""
    from lora_core.experiments import experiments, result_here, stored_result

    found = []
    cells = [("name", "section", "verdict", "here", "question")]
    for e in experiments():
        stored, here = stored_result(e.name), result_here(e.name)
        found.append({**e.to_dict(), "verdict": stored.verdict if stored else None, **_of(stored),
                      "here": {"verdict": here.verdict, **_of(here)} if here else None})  # fmt: skip
        cells.append((e.name, e.section, _short(stored), _short(here), e.question))
    return Answer(value={"experiments": found}, text=table(cells), json=json)


def _of(result: Result | None) -> dict[str, Any]:
    keys = ("sentence", "quick", "seconds", "model", "command", "seeds")
    return {k: getattr(result, k) if result else None for k in keys}


def _short(result: Result | None) -> str:
    return "-" if result is None else result.verdict + (" (quick)" if result.quick else "")


@cli.command()
def show(name: Name, here: Annotated[bool, typer.Option(help="The one made on this machine.")] = False,
         json: Json = False) -> Answer:  # fmt: skip
    """The stored result of an experiment, with all its rows."""
    from lora_core.experiments import find_experiment, result_here, stored_result

    e = find_experiment(name)
    result = result_here(name) if here else stored_result(name) or result_here(name)
    if result is None:
        raise UserError(f"there is no result of {name!r} yet: lora-lab experiment run {name}")
    return _answer(e, result, json)


@cli.command()
def run(
    name: Name,
    quick: Annotated[bool, typer.Option("--quick", help="The version that takes about two minutes.")] = False,
    seeds: Annotated[str, typer.Option(help="What to repeat with, with commas.")] = "0,1,2",
    steps: Annotated[int | None, typer.Option(help="Training steps instead of the experiment's own number.")] = None,
    encoder: Annotated[str, typer.Option(help="The model that classification runs on.")] = "minilm",
    writer: Annotated[str, typer.Option(help="The model that writes text.")] = "smollm2-135m",
    out: Annotated[Path | None, typer.Option(help="Write the result into this file too.")] = None,
    json: Json = False,
) -> Answer:
    """Answer a question here. Interrupted, it goes on where it stopped when the same command is given again."""
    from tqdm import tqdm

    from lora_core.experiments import Lab, Progress, find_experiment, run_experiment
    from lora_core.home import write_text, writing

    e = find_experiment(name)
    if steps is not None and steps < 1:
        raise UserError(f"steps is {steps}; it must be at least 1")
    numbers = [s.strip() for s in seeds.split(",")]
    if not all(s.isdigit() for s in numbers) or len(set(numbers)) < len(numbers):
        raise UserError(f"seeds are different whole numbers with commas, such as 0,1,2; given {seeds!r}")
    with tqdm(total=100, file=sys.stderr, leave=False, bar_format="{desc} |{bar}| {percentage:.0f} %{postfix}") as bar:

        def tell(p: Progress) -> None:
            bar.n = 100 * p.done
            bar.set_description_str(f"{p.name}: {p.cell}")
            bar.set_postfix_str("" if p.left_s is None else f"about {duration(p.left_s)} left")

        lab = Lab(quick=quick, seeds=[int(s) for s in numbers], steps=steps, encoder=encoder, writer=writer, tell=tell)
        result = run_experiment(name, lab)
    if out is not None:
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            write_text(out, result.to_json())
    return _answer(e, result, json)


def _answer(e: Experiment, r: Result, json: bool) -> Answer:
    from app.figures_experiments import figure

    chip = r.machine.get("chip", "")
    meta = figure(r)["layout"]["meta"]
    numbers = f"{table(meta['table'])}\n\n" if meta["table"] else ""
    on = f"{chip}, {r.made}" if r.made else chip
    text = (f"{e.question}\n\nThe paper (section {e.section}): {e.claim}\n\n{r.verdict}{' (quick)' if r.quick else ''}:"
            f" {r.sentence}\n\n{numbers}{r.model}, seeds {', '.join(map(str, r.seeds))}, {duration(r.seconds)} on {on};"
            f" {len(r.rows)} measurements, with --json\n{r.command}")  # fmt: skip
    return Answer(value={**e.to_dict(), **r.to_dict()}, text=text, json=json)
