"""The command line, `lora-lab …`: all that the page does, for a terminal and for scripts.

Every command takes `--json` and then prints exactly one JSON object on standard output; progress, notes and errors go
to standard error. Exit status: 0 done; 2 the input was wrong (one line says how); 1 anything else; 130 interrupted.
The commands are in app/commands and import torch when they run: `lora-lab --help` is there at once.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout, suppress

import typer

from app.commands import adapters, experiments, models, ranks, runs, serve, sweep, train
from app.commands.output import Result, say, show
from lora_core.errors import UserError
from lora_core.home import home

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130

cli = typer.Typer(
    name="lora-lab",
    help="See how low-rank adaptation works: train a LoRA adapter on a small language model, compare, look inside.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
cli.command("serve")(serve.serve)
cli.command("models")(models.models)
cli.command("budget")(models.budget)
cli.command("train")(train.train)
cli.command("sweep")(sweep.sweep)
cli.command("compare")(adapters.compare)
cli.command("eval")(adapters.evaluate)
cli.command("spectra")(adapters.spectra)
cli.command("audit")(ranks.audit)
cli.command("compress")(ranks.compress)
cli.command("merge")(adapters.merge)
cli.add_typer(runs.cli, name="runs")
cli.add_typer(experiments.cli, name="experiment")


def main() -> None:
    """The entry point `lora-lab`."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line; gives its exit status. Prints the result, or one line about what went wrong."""
    for name, value in (("HF_HUB_DISABLE_TELEMETRY", "1"), ("GRADIO_ANALYTICS_ENABLED", "False"),
                        ("TOKENIZERS_PARALLELISM", "false"), ("TRANSFORMERS_VERBOSITY", "error")):  # fmt: skip
        os.environ.setdefault(name, value)
    out = sys.stdout
    try:
        # what a library prints while a command runs is no part of the result
        with redirect_stdout(sys.stderr) if _is_command(arguments) else nullcontext():
            result = cli(list(arguments), standalone_mode=False)
        if not isinstance(result, Result):
            return result if isinstance(result, int) else DONE
        show(result, out)
        return result.status
    except UserError as error:
        say(f"lora-lab: {error}")
        return WRONG_INPUT
    except typer.TyperException as error:
        say(_usage(error))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # `lora-lab … | head`: nobody reads any more
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        say(f"lora-lab: {type(error).__name__}: {' '.join(str(error).split())[:300]}; {_log(arguments)}")
        return FAILED


def _is_command(arguments: Sequence[str]) -> bool:
    """Whether a command will run, rather than a help text be printed (that belongs on standard output)."""
    return bool(arguments) and "--help" not in arguments


def _usage(error: typer.TyperException) -> str:
    """What was wrong with the options in one line, and where help is; the help text itself when nothing was given."""
    message = getattr(error, "format_message", lambda: str(error))()
    if "\n" in message.strip():
        return message
    context = getattr(error, "ctx", None)
    where = getattr(context, "command_path", "lora-lab")
    return f"lora-lab: {message.rstrip('.')}; `{where} --help` lists what is possible"


def _log(arguments: Sequence[str]) -> str:
    """Write the traceback of the present error into the log; where that is, in words."""
    try:
        file = home() / "log.txt"
        with open(file, "a", encoding="utf-8") as log:
            when = time.strftime("%Y-%m-%d %H:%M:%S")
            log.write(f"{when} lora-lab {' '.join(arguments)}\n{traceback.format_exc()}\n")
        return f"details are in {file}"
    except (OSError, UserError):
        return "no log could be written"


if __name__ == "__main__":
    main()
