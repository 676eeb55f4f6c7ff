"""The command `tutti`: its help, its commands, and how mistakes and signals are shown."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from tutti import __version__
from tutti.cli import (
    commands,
    config_commands,
    data_commands,
    evaluate_command,
    export_command,
    init_command,
    play_command,
    report_command,
    serve_command,
    study_commands,
)
from tutti.cli.signals import how_to_go_on, obeyed
from tutti.config.files import check_path_text
from tutti.errors import Terminated, UserError, printable
from tutti.models.pretrained.hub import DOWNLOAD
from tutti.runs.terminal import Terminal, console, show_logs
from tutti.storage.reading import shown

Command = Callable[..., None]

MISTAKE = 2
MISTAKE_CHARACTERS = 900
"""Of a message about a wrong command line, in typer's frame of 80 columns."""

COMMANDS: tuple[Command, ...] = (
    *(commands.demo, play_command.play, serve_command.serve),
    *(commands.record, commands.train, evaluate_command.evaluate, report_command.report),
    *(commands.doctor, commands.probe, commands.verify_resume, commands.replay, export_command.export),
    *(
        study_commands.compare,
        study_commands.tune,
        init_command.init,
        export_command.push,
        export_command.pull,
        config_commands.configs,
        config_commands.schema,
        commands.model,
        commands.plan,
        commands.env,
        commands.version,
    ),
)
"""In the order of `tutti --help`."""


class Commands(TyperGroup):
    """The group of commands; a message about a wrong command line fits on a screen and steers no terminal."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """As typer's: reads what is given before the name of a command."""
        with _one_screen():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """As typer's: reads the arguments of the command, and calls it."""
        with _one_screen():
            return super().invoke(ctx)


@contextmanager
def _one_screen() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        said = getattr(error, "format_message", None)  # typer's base class of these has no public name
        if said is not None:
            text = shown(printable(said()), MISTAKE_CHARACTERS, quoted=False)
            vars(error)["format_message"] = lambda: text
        raise


app = typer.Typer(
    name="tutti",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def guarded(command: Command) -> Command:
    """Shows a mistake of the user as a message instead of a traceback, and after a signal how to continue."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        errors = Terminal(stderr=True, highlight=False)
        try:
            with obeyed():
                show_logs()
                for value in (*arguments, *options.values()):
                    if isinstance(value, Path):
                        check_path_text(value)
                command(*arguments, **options)
                sys.stdout.flush()  # what cannot be written is an error of the command
        except (KeyboardInterrupt, Terminated) as error:
            code = error.exit_code if isinstance(error, Terminated) else 128 + signal.SIGINT
            with suppress(OSError):  # the terminal may be gone
                errors.print(how_to_go_on(code - 128), style="yellow")
            raise typer.Exit(code) from None
        except BrokenPipeError:
            console.on_broken_pipe()
        except (ValueError, OSError, RecursionError, MemoryError) as error:
            message = str(error) if isinstance(error, UserError) else system_error_message(error)
            if not message:
                raise
            with suppress(OSError):
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
    download: Annotated[
        bool,
        typer.Option("--download", help="Models of a hub that the config names (hf:NAME) may be fetched."),
    ] = False,
) -> None:
    """Tutti pre-trains vision-language-action robot models end to end: vision
    encoder, language encoder, fusion and action decoder learn together, from one
    batch, under one loss L = sum_i lambda_i L_i.

    [bold]Start here[/bold]

      tutti demo     record, train, evaluate, report: 10 to 25 minutes
      tutti play     a trained policy acts: a moving picture in seconds
      tutti serve    a trained policy answers robots, as openpi's server does

    [bold]The same in pieces, in the usual order[/bold]

      tutti record configs/demo.yaml     the simulator's experts -> dataset/
      tutti train configs/demo.yaml      demonstrations -> checkpoints/
      tutti evaluate runs/demo           checkpoint -> success per task
      tutti report runs/demo             all of it -> report.html

    [bold]What is wrong, before a training and after it[/bold]

      tutti data inspect my/data         what it holds, how to train on it
      tutti data check my/data           texts, units, cameras, copies, split
      tutti data convert my/data new     any format -> LeRobot v3.0
      tutti doctor configs/demo.yaml     data, model, loss: is anything broken?
      tutti probe runs/demo              does it look, listen, or copy its state?
      tutti verify-resume configs/demo.yaml     killed, resumed: the same bits?
      tutti replay runs/demo --step 2600        one step again, to the same bits

    [bold]What will it need? Memory, time, traffic, before anything runs[/bold]

      tutti plan configs/plans/3b.yaml --gpus 8 --episodes 1e7

    [bold]At which learning rate? Short trainings, judged on held-out episodes[/bold]

      tutti tune --rate configs/demo.yaml

    [bold]With which keys? Optuna, rungs, and a confirmation from fresh seeds[/bold]

      tutti tune demo --space examples/demo_space.yaml

    [bold]Which way is better? At an equal budget, over seeds, with intervals[/bold]

      tutti compare configs/studies/strategies.yaml

    [bold]Change anything, in the file or behind it[/bold]

      tutti train configs/demo.yaml name=short training.steps=500 \\
        'data.sources=[{path: runs/demo/dataset}]'     the demo's data again
      tutti init my/data                 four questions, a config of your own
      tutti config show mine.yaml        all keys, and where each comes from
      tutti config diff demo mine.yaml   in what two configs or runs differ
      tutti configs                      the configs that are shipped, by name
      tutti schema > tutti.schema.json   every key, for an editor

    Interrupt any command with Ctrl-C and run it again: finished work is kept.
    """
    if download:
        os.environ[DOWNLOAD] = "1"  # for the processes that it starts, too


for one in COMMANDS:
    app.command()(guarded(one))
data = typer.Typer(name="data", no_args_is_help=True)
for one in (data_commands.inspect, data_commands.check, data_commands.convert, data_commands.cache):
    data.command()(guarded(one))
app.add_typer(data)
config = typer.Typer(name="config", no_args_is_help=True)
for one in (config_commands.show, config_commands.diff):
    config.command()(guarded(one))
app.add_typer(config)


@config.callback()
def _config_options() -> None:
    """Config files: `show` prints the whole of one and where each value comes from, `diff` in what two
    differ."""


@data.callback()
def _data_options() -> None:
    """Recorded data: `inspect` says what they hold, `check` what is wrong with them, and `convert` makes
    LeRobot v3.0 of any format. `cache` lists and deletes what is kept of them for all runs."""


def system_error_message(error: Exception) -> str:
    """The error of the machine or a file in one sentence; empty for a bug of Tutti."""
    file = getattr(error, "filename", None)
    match error:
        case OSError():
            where = f"{file}: " if file else ""
            said = f"{where}{error.strerror or error}. Check that the file is there and may be used."
        case UnicodeError():
            said = f"a file or a name is not UTF-8 text ({str(error)[:200]})."
        case RecursionError():
            said = "a file, or the config, is nested too deeply."
        case MemoryError():
            why = f" ({str(error)[:200]})" if str(error) else ""
            said = f"not enough memory{why}. Check the sizes that the config and the files name."
        case _:
            said = ""
    return str(UserError(said))
