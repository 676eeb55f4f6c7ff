"""Arguments and options that several commands of `tutti` share, and the config that they name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tutti import __version__
from tutti.config.paths import config_file
from tutti.config.yaml_reader import check_keys

if TYPE_CHECKING:
    from tutti.config.run_config import RunConfig

Config = Annotated[Path, typer.Argument(help="A YAML file, such as configs/demo.yaml.", metavar="CONFIG")]
DemoConfig = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Another YAML file than the demo's own.", metavar="CONFIG"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Values that win over the file's, such as training.steps=500.", metavar="[KEY.SUB=VALUE ...]"
    ),
]
Run = Annotated[Path, typer.Argument(help="A run's folder, such as runs/demo.", metavar="RUN")]
Folder = Annotated[
    Path | None, typer.Option("--run", help="The run's folder.", show_default="runs/NAME", metavar="FOLDER")
]
Study = Annotated[
    Path, typer.Argument(help="A YAML file, such as configs/studies/strategies.yaml.", metavar="STUDY")
]
StudyFolder = Annotated[
    Path | None,
    typer.Option("--folder", help="The study's folder.", show_default="runs/studies/NAME", metavar="FOLDER"),
]
ReportOnly = Annotated[
    bool, typer.Option("--report-only", help="Makes the tables of what is finished, and runs nothing.")
]
Updates = Annotated[
    int, typer.Option("--updates", help="Updates before the second look at the gradients.", min=0)
]
Redo = Annotated[
    bool,
    typer.Option("--redo", help="Where the config changed, throw away what depends on it and do it again."),
]
TrustCode = Annotated[
    bool,
    typer.Option("--trust-code", help="Import classes that the run's config names: runs their code."),
]


def _print_version(yes: bool) -> bool:
    if yes:
        typer.echo(f"tutti {__version__}")
        raise typer.Exit
    return yes


Version = Annotated[
    bool, typer.Option("--version", help="Prints the version.", callback=_print_version, is_eager=True)
]


def load(path: Path, overrides: list[str] | None) -> RunConfig:
    """The config of a file with overrides; unknown keys are refused before an import of torch."""
    check_keys(file := config_file(path), overrides or [])
    from tutti.config.run_config import load_config

    return load_config(file, overrides or [])
