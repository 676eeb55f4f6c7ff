"""The commands `tutti data ...`: what is wrong with recorded data, before anything is trained on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tutti import __version__
from tutti.errors import UserError


def check(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="LeRobot data sets, or config files whose data.sources are checked together; and values "
            "that win over the config's, such as data.horizon=8.",
            metavar="PATH ... [KEY.SUB=VALUE ...]",
        ),
    ],
    report: Annotated[
        Path | None, typer.Option("--report", help="Write a page with pictures.", metavar="FILE.html")
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Says what is wrong with recorded data: texts, copies, units, outliers, cameras, lengths, the split.

    Ends with 0 where nothing is serious, 1 with faults or warnings, 2 where data cannot be read. Nothing is
    trained or written. docs/how-to/check-data.md lists every check with its threshold and cure.
    """
    overrides = [one for one in paths if "=" in one and not Path(one).exists()]
    places = [one for one in paths if one not in overrides]
    if not places:
        raise UserError("tutti data check: name a data set or a config file: tutti data check my/data")
    from tutti.runs.data_check import check_path, print_checked
    from tutti.runs.terminal import print_line, progress_bar, quiet

    with quiet(as_json):
        checked = []
        for place in places:
            with progress_bar(f"checking {place}") as bar:
                checked.append(check_path(place, overrides, bar))
            print_checked(checked[-1])
        if report is not None:
            from tutti.report.data_page import write_data_page

            write_data_page(report, checked)
            print_line(f"Written: {report}")
    if as_json:
        found = {"version": __version__, "paths": [one.to_dict() for one in checked]}
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
    if code := max(one.code for one in checked):
        raise typer.Exit(code)
