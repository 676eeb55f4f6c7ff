"""What a run says on the terminal: lines, progress bars with the time left, the closing summary."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

console = Console(highlight=False)


@runtime_checkable
class Bar(Protocol):
    """Moves a progress bar."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None: ...


QUIET_SECONDS = 30.0


def print_line(line: str) -> None:
    """Prints one line as it is."""
    console.print(Text(line), soft_wrap=True)


class _Sayer(logging.Handler):
    """Says what is logged, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        print_line(record.getMessage())


@contextmanager
def quiet(yes: bool) -> Iterator[None]:
    """Inside the block nothing is said, if `yes`: of several processes only the first one speaks."""
    before, console.quiet = console.quiet, console.quiet or yes
    try:
        yield
    finally:
        console.quiet = before


def show_logs() -> None:
    """Shows what the package logs. For the command line: a program that imports tutti keeps its own ways."""
    logger = logging.getLogger("tutti")
    if not logger.handlers:
        logger.addHandler(_Sayer())
    logger.setLevel(logging.INFO)


@contextmanager
def progress_bar(title: str) -> Iterator[Bar]:
    """Gives the function that moves a bar with the time left: called with done, total (0: not known), a note.

    Where the output is not a terminal (a log file, CI) a line is printed every half minute instead.
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
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=None, note="")
        yield lambda done, total, note="": progress.update(
            task, completed=done, total=total or None, note=note
        )


def _lines(title: str) -> Bar:
    started = last = time.monotonic()

    def show(done: int, total: int, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < QUIET_SECONDS and done != total:
            return
        last = now
        left = f", {(now - started) / done * (total - done):.0f} s left" if 0 < done < total else ""
        print_line(
            f"{title}: {done}{f'/{total}' if total else ''} after {now - started:.0f} s{left} {note}".rstrip()
        )

    return show


TEACH = """
Tutti pre-trains vision-language-action robot models end to end: vision
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
"""What `tutti --help` says first."""


def of_the_system(error: Exception) -> str:
    """What the machine or a file refused, in a sentence; empty for a mistake of Tutti's own."""
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
