"""The command `tutti`: its commands in the order of `tutti --help`, and how mistakes and Ctrl-C are shown.

The commands import the package inside their bodies, and only here is that right: torch alone takes seconds to
load, and `tutti --help` or a misspelt key should answer at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from tutti.cli import debug_commands, run_commands, study_commands
from tutti.cli.help import HELP
from tutti.cli.options import Version
from tutti.errors import UserError
from tutti.runs.terminal import show_logs

Command = Callable[..., None]

INTERRUPTED = 130
MISTAKE = 2

COMMANDS: tuple[Command, ...] = (
    run_commands.demo,
    run_commands.record,
    run_commands.train,
    run_commands.evaluate,
    run_commands.report,
    debug_commands.doctor,
    debug_commands.probe,
    debug_commands.verify_resume,
    debug_commands.replay,
    run_commands.export,
    study_commands.compare,
    run_commands.schema,
    run_commands.model,
    study_commands.plan,
    run_commands.version,
)

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


@app.callback(help=HELP)
def options(_: Version = False) -> None:
    """Options of `tutti` itself; the help text is HELP."""


for one in COMMANDS:
    app.command()(guarded(one))


def main() -> None:
    """The console script."""
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
