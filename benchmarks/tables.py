"""A benchmark's result for people and machines: a table on the terminal, the same in Markdown, and JSON."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

from tutti.runs.terminal import print_line, print_table
from tutti.storage.files import write_atomically, write_json
from tutti.types import UserError

P = ParamSpec("P")
MISTAKE = 2
RESULTS = Path(__file__).resolve().parent / "results"


def prints_user_errors(main: Callable[P, int]) -> Callable[P, int]:
    """Decorates a benchmark's `main`: a mistake of the user is one line and exit code 2, not a traceback."""

    @functools.wraps(main)
    def run(*arguments: P.args, **options: P.kwargs) -> int:
        try:
            return main(*arguments, **options)
        except UserError as error:
            print_line(f"error: {error}")
            return MISTAKE

    return run


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A title, column heads and rows of texts; the first column is left-aligned."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table as Markdown, with its title above."""
        rule = ["---", *["---:"] * (len(self.heads) - 1)]
        lines = [self.heads, tuple(rule), *self.rows]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])

    def show(self) -> None:
        """The table on the terminal."""
        print_table(self.title, self.heads, self.rows)


def publish(
    path: Path, title: str, tables: Sequence[Table], notes: Sequence[str], result: dict[str, Any]
) -> None:
    """Prints the tables and notes, and writes them to `<path>.md`, and `result` to `<path>.json`."""
    for table in tables:
        table.show()
    for note in notes:
        print_line(note)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join([f"# {title}", *(table.markdown() for table in tables), *notes])
    write_atomically(path.with_suffix(".md"), f"{text}\n")
    write_json(path.with_suffix(".json"), result)
    print_line(f"Written: {path.with_suffix('.md')}, {path.with_suffix('.json')}")
