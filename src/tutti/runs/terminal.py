"""Prints to the terminal: lines, log records, and progress bars with the time left."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn, Protocol, runtime_checkable

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from tutti.errors import printable
from tutti.findings import Finding


class Terminal(Console):
    """Ends the process without a word when nobody reads on (`tutti ... | head`), as SIGPIPE would."""

    def on_broken_pipe(self) -> NoReturn:
        """Raises: SystemExit."""
        for stream in (sys.stdout, sys.stderr):  # what they still hold is written at the end
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise SystemExit(128 + signal.SIGPIPE)


console = Terminal(highlight=False)


@runtime_checkable
class Bar(Protocol):
    """Moves a progress bar."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None: ...


QUIET_SECONDS = 30.0


def as_text(value: str) -> Text:
    """A text to print as it is, whatever characters a file may have brought into it."""
    return Text(printable(value))


def print_line(line: str) -> None:
    """Prints one line as it is."""
    console.print(as_text(line), soft_wrap=True)


def print_table(
    title: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    last: Sequence[str] = (),
    narrow: bool = False,
) -> None:
    """Prints a table: the first column aligned left, the others right; a line above the row `last`."""
    shown = Text(printable(title), "table.title")
    table = Table(title=shown, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    if narrow:  # fits more columns into 80 characters
        table.padding = (0, 1, 0, 0)
    for number, head in enumerate(heads):
        table.add_column(as_text(head), justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        table.add_row(*map(as_text, row))
    if last:
        table.add_section()
        table.add_row(*map(as_text, last))
    console.print(table)


def print_findings(findings: Sequence[Finding]) -> None:
    """One line each: the hints behind -, and last the faults and warnings behind !."""
    for finding in sorted(findings, key=lambda one: one.is_problem):
        print_line(f"{'!' if finding.is_problem else '-'} {finding.text}")


class _PrintHandler(logging.Handler):
    """Prints log records, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # a terminal that was closed ends no training
            print_line(record.getMessage())


@contextmanager
def quiet(on: bool) -> Iterator[None]:
    """Prints nothing inside the block, if `on`: of several processes only rank 0 prints."""
    before, console.quiet = console.quiet, console.quiet or on
    try:
        yield
    finally:
        console.quiet = before


def show_logs() -> None:
    """Prints the log of the package. For the command line only: a library leaves logging to its user."""
    logger = logging.getLogger("tutti")
    if not logger.handlers:
        logger.addHandler(_PrintHandler())
    logger.setLevel(logging.INFO)


@contextmanager
def progress_bar(title: str) -> Iterator[Bar]:
    """Yields a function that moves a bar with the time left: called with done, total (0: unknown), a note.

    Where the output is not a terminal (a log file, CI) it prints a line every half minute instead.
    """
    if not console.is_terminal:
        yield _lines(title)
        return
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=None, note="")
        yield lambda done, total, note="": progress.update(
            task, completed=done, total=total or None, note=printable(note)
        )


def _lines(title: str) -> Bar:
    started = last = time.monotonic()
    before = told = -1  # before: what was done at first, which is no measure of the speed

    def show(done: int, total: int, note: str = "") -> None:
        nonlocal last, before, told
        now = time.monotonic()
        before = done if before < 0 else before
        if now - last < QUIET_SECONDS and (done != total or done == told):
            return
        last, told = now, done
        new = done - before
        left = f", {(now - started) / new * (total - done):.0f} s left" if new > 0 and done < total else ""
        print_line(
            f"{title}: {done}{f'/{total}' if total else ''} after {now - started:.0f} s{left} {note}".rstrip()
        )

    return show
