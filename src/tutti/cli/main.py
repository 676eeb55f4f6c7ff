"""The command `tutti`: its help, its commands, and how mistakes and Ctrl-C are shown."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from tutti import __version__
from tutti.cli import commands
from tutti.distributed.launcher import end_with_launcher
from tutti.errors import UserError
from tutti.runs.terminal import show_logs

Command = Callable[..., None]

INTERRUPTED = 130
MISTAKE = 2

COMMANDS: tuple[Command, ...] = (
    *(commands.demo, commands.record, commands.train, commands.evaluate, commands.report),
    *(commands.doctor, commands.probe, commands.verify_resume, commands.replay, commands.export),
    *(commands.compare, commands.schema, commands.model, commands.plan, commands.version),
)
"""In the order of `tutti --help`."""

app = typer.Typer(
    name="tutti",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def guarded(command: Command) -> Command:
    """Shows a mistake of the user as a message instead of a traceback, and after Ctrl-C how to continue."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        errors = Console(stderr=True, highlight=False)
        try:
            show_logs()
            command(*arguments, **options)
        except KeyboardInterrupt:
            errors.print("\ninterrupted; run the same command again to continue", style="yellow")
            raise typer.Exit(INTERRUPTED) from None
        except (ValueError, OSError, RecursionError, MemoryError) as error:
            message = str(error) if isinstance(error, UserError) else system_error_message(error)
            if not message:
                raise
            errors.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
            raise typer.Exit(MISTAKE) from None

    return run


def _print_version(yes: bool) -> bool:
    if yes:
        typer.echo(f"tutti {__version__}")
        raise typer.Exit
    return yes


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", help="Prints the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Tutti pre-trains vision-language-action robot models end to end: vision
    encoder, language encoder, fusion and action decoder learn together, from one
    batch, under one loss L = sum_i lambda_i L_i.

    [bold]Start here[/bold]

      tutti demo     record, train, evaluate, report: 10 to 25 minutes

    [bold]The same in pieces, in the usual order[/bold]

      tutti record configs/demo.yaml     the simulator's experts -> dataset/
      tutti train configs/demo.yaml      demonstrations -> checkpoints/
      tutti evaluate runs/demo           checkpoint -> success per task
      tutti report runs/demo             all of it -> report.html

    [bold]What is wrong, before a training and after it[/bold]

      tutti doctor configs/demo.yaml     data, model, loss: is anything broken?
      tutti probe runs/demo              does it look, listen, or copy its state?
      tutti verify-resume configs/demo.yaml     killed, resumed: the same bits?
      tutti replay runs/demo --step 4600        one step again, to the same bits

    [bold]What will it need? Memory, time, traffic, before anything runs[/bold]

      tutti plan configs/plans/3b.yaml --gpus 8 --episodes 1e7

    [bold]Which way is better? At an equal budget, over seeds, with intervals[/bold]

      tutti compare configs/studies/strategies.yaml

    [bold]Change anything, in the file or behind it[/bold]

      tutti train configs/demo.yaml name=short training.steps=500 \\
        'data.sources=[{path: runs/demo/dataset}]'     the demo's data again
      tutti train configs/demo.yaml name=mine 'data.sources=[{path: my/data}]'
      tutti schema > tutti.schema.json   every key, for an editor

    Interrupt any command with Ctrl-C and run it again: finished work is kept.
    """


for one in COMMANDS:
    app.command()(guarded(one))


def main() -> None:
    """The console script."""
    end_with_launcher()
    app()


def system_error_message(error: Exception) -> str:
    """The error of the machine or a file in one sentence; empty for a bug of Tutti."""
    file = getattr(error, "filename", None)
    match error:
        case BrokenPipeError():
            return ""
        case OSError():
            where = f"{file}: " if file else ""
            return f"{where}{error.strerror or error}. Check that the file is there and may be used."
        case UnicodeError():
            return f"a file or a name is not UTF-8 text ({str(error)[:200]})."
        case RecursionError():
            return "a file, or the config, is nested too deeply."
        case MemoryError():
            said = f" ({str(error)[:200]})" if str(error) else ""
            return f"not enough memory{said}. Check the sizes that the config and the files name."
        case _:
            return ""
