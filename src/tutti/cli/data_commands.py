"""The commands `tutti data ...`: what is in recorded data, what is wrong with them, and their conversion."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from tutti import __version__
from tutti.errors import UserError


def check(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Data sets, or config files whose data.sources are checked together; and values "
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


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            help="A data set in any format: its folder, file or URL; or a config file, whose robots and "
            "their numbers are shown.",
            metavar="PATH",
        ),
    ],
    sheet: Annotated[
        Path | None,
        typer.Option("--sheet", help="Write pictures of some episodes in every view.", metavar="FILE.png"),
    ] = None,
) -> None:
    """Says what a data set holds, what each feature is taken for and why, and how to train on it.

    Reads any format (docs/how-to/own-data.md lists them). Nothing is trained or written but the sheet.
    """
    from tutti.data.checks.inspection import inspect_path
    from tutti.runs.data_check import defaults_for, is_config
    from tutti.runs.data_inspect import print_inspected, print_sources, write_sheet
    from tutti.runs.terminal import print_line

    if is_config(path):
        if sheet is not None:
            raise UserError(
                f"--sheet: {path} is a config.\n  expected: one data set, whose pictures are shown"
            )
        print_sources(path)
        return
    source = defaults_for(path, ()).data.sources[0]
    source.fetch()
    print_inspected(inspected := inspect_path(source.path, url=source.url))
    if sheet is not None:
        write_sheet(inspected, sheet)
        print_line(f"Written: {sheet}")


def convert(
    source: Annotated[str, typer.Argument(help="A data set of any format that Tutti reads.", metavar="SRC")],
    target: Annotated[Path, typer.Argument(help="The folder to write.", metavar="DST")],
    keys: Annotated[
        list[str] | None,
        typer.Argument(
            help=r"Keys of a source: views=\[front] state=\[arm,hand] exclude=[3].", metavar="[KEY=VALUE ...]"
        ),
    ] = None,
    *,
    pictures: Annotated[
        Literal["video", "png"], typer.Option("--pictures", help="video (AV1) or png (without loss).")
    ] = "video",
    shard: Annotated[
        str, typer.Option("--shard", help="The i-th of n parts, on machines that share DST.", metavar="I/N")
    ] = "1/1",
    workers: Annotated[
        int | None, typer.Option("--workers", min=0, help="Processes; one a core unless given.")
    ] = None,
) -> None:
    """Converts a data set to LeRobot v3.0: views as video or PNG, one process a core, checked at the end.

    Interrupted or killed, the same command goes on and ends in the same files. DST is there when it is whole.
    """
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard)
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"--shard: expected I/N with I from 1 to N, such as 2/8, found {shard!r:.40}.")
    from tutti.runs.data_check import defaults_for
    from tutti.runs.data_convert import convert as convert_source
    from tutti.runs.data_convert import lenient

    given = keys or []
    config = defaults_for(source, [f"data.sources.0.{one}" for one in given]).data.sources[0]
    if not any(one.startswith("labels") for one in given):
        config = lenient(config)
    storage = "image" if pictures == "png" else "video"
    convert_source(config, target, storage=storage, shard=(number, count), workers=workers)


def cache(
    evict: Annotated[
        list[str] | None,
        typer.Option("--evict", help="Delete this cache; all: every one.", metavar="NAME"),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder", help="Another folder of caches.", show_default="$TUTTI_CACHE, ~/.cache/tutti"
        ),
    ] = None,
) -> None:
    """Lists what is kept for all runs: decoded pictures, features of frozen towers, fetched data sets.

    It is always safe to delete a cache that no training uses: it is built again when it is needed.
    """
    from datetime import datetime

    from tutti.data.cache.entries import entries
    from tutti.data.cache.entries import evict as delete
    from tutti.runs.terminal import print_line, print_table
    from tutti.storage.files import cache_home, megabytes

    home = folder or cache_home()
    for name in evict or ():
        for one in [entry.name for entry in entries(home)] if name == "all" else [name]:
            delete(home, one)
            print_line(f"deleted {home / one}")
    found = entries(home)
    rows = [
        (one.name, megabytes(one.size), f"{datetime.fromtimestamp(one.used):%Y-%m-%d %H:%M}") for one in found
    ]
    total = ("all", megabytes(sum(one.size for one in found)), "")
    print_table(f"Caches in {home}", ("name", "size", "last changed"), rows, last=total)
