"""The commands about config files: those that are shipped, and the schema of all keys."""

from __future__ import annotations

import json
import re
from itertools import takewhile
from pathlib import Path
from textwrap import fill, indent
from typing import Annotated

import typer

from tutti.config.files import config_file, shipped_configs, shipped_names
from tutti.runs.terminal import print_line
from tutti.storage.reading import read_text


def configs(
    name: Annotated[
        Path | None,
        typer.Argument(help="Prints this one: tutti configs demo > mine.yaml", metavar="NAME"),
    ] = None,
) -> None:
    """Lists the shipped configs, which every command takes by name; prints one, to begin your own from."""
    if name is not None:
        typer.echo(read_text(config_file(name)), nl=False)
        return
    for one in shipped_names():
        lines = takewhile(re.compile("# (?! )").match, read_text(shipped_configs() / one).splitlines())
        about = " ".join(line.lstrip("# ") for line in lines).partition(". ")[0].rstrip(".:")
        print_line(f"{one}\n{indent(fill(f'{about}.', 96), '    ')}")
    print_line("studies/ are for tutti compare, plans/ for tutti plan. The part before .yaml is enough.")


def schema() -> None:
    """Prints the JSON schema of a config file."""
    from tutti.config.run_config import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))
