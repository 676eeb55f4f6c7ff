"""The command `tutti report`: the page of a run as a file, or of several runs while they train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tutti.config.files import require_run
from tutti.errors import UserError
from tutti.runs.terminal import print_line


def report(
    runs: Annotated[list[Path], typer.Argument(help="A run's folder, such as runs/demo.", metavar="RUN")],
    *,
    serve: Annotated[
        bool, typer.Option("--serve", help="Show RUN ... in a browser, up to date while they train.")
    ] = False,
    language: Annotated[
        Literal["en", "zh"], typer.Option("--language", help="zh: in Chinese, written to report.zh.html.")
    ] = "en",
    port: Annotated[int, typer.Option("--port", help="On this machine alone.", min=0, max=65535)] = 7007,
) -> None:
    """Writes the run's report: one self-contained HTML page, and summary.json for machines.

    tutti report runs/a runs/b --serve    the curves of both over each other, as they train
    """
    for run in runs:
        require_run(run)
    if not serve and len(runs) > 1:
        raise UserError("tutti report writes the report of one run. To see several together, add --serve.")
    if serve:
        from tutti.report.live import serve_report

        with serve_report(runs, port, language) as server:
            print_line(f"http://127.0.0.1:{server.server_address[1]}/    Ctrl-C ends it")
            server.serve_forever()
        return
    from tutti import pipeline

    pipeline.report(runs[0])
    if language != "en":
        from tutti.report import write_report

        print_line(f"Report: {write_report(runs[0], language)}")
