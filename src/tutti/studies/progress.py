"""What a study shows while it runs: a line for each running cell, the totals, and when all of it will end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from tutti.runs.terminal import console, print_line
from tutti.studies.cells import Cell
from tutti.studies.standing import Standing, Work, standing

LINES_EVERY = 60.0
"""Seconds between lines where the output is no terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """When a cell was started in this session, and what it had done before."""

    moment: float
    units: float


class Board:
    """Totals and running cells; a live table on a terminal, else a line at each end and each minute."""

    def __init__(
        self, work: Mapping[Cell, Work], found: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`work` of the cells to do; `found` more were finished before."""
        self.work, self.found = dict(work), found
        self.finished = self.failed = 0
        self._clock = clock
        self._begun: dict[Cell, _Begun] = {}
        self._ended: set[Cell] = set()
        self._won = 0.0  # units of this session by cells that have ended
        self._started = self._last = clock()
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, cell: Cell) -> None:
        """A cell's process was started."""
        now = standing(cell.folder, self.work[cell])
        self._begun[cell] = _Begun(moment=self._clock(), units=now.units)

    def end(self, cell: Cell, failure: str = "") -> None:
        """A cell has ended, well unless `failure` says otherwise."""
        begun = self._begun[cell]
        seconds = self._clock() - begun.moment
        self._ended.add(cell)
        if failure:
            self.failed += 1
            print_line(f"{cell.name}: FAILED after {_span(seconds)}")
            return
        self.finished += 1
        self._won += self.work[cell].units - begun.units
        print_line(f"{cell.name}: done in {_span(seconds)} ({self.totals([])})")

    def tick(self, running: Sequence[Cell]) -> None:
        """Shows how far the running cells are."""
        standings = {cell: standing(cell.folder, self.work[cell]) for cell in running}
        if self._live is not None:
            self._live.update(self._table(standings), refresh=True)
        elif running and self._clock() - self._last >= LINES_EVERY:
            self._last = self._clock()
            each = "; ".join(f"{cell.name}: {now.text}" for cell, now in standings.items())
            print_line(f"{self.totals(list(standings.items()))}. {each}")

    def totals(self, running: Sequence[tuple[Cell, Standing]]) -> str:
        """As "12 of 30 done, 1 failed, 2 running, 1 h 12 min left"."""
        whole = self.found + len(self.work)
        parts = [f"{self.found + self.finished} of {whole} done"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        if running:
            parts.append(f"{len(running)} running")
        left = self.seconds_left(running)
        return ", ".join([*parts, *([f"{_span(left)} left"] if left else [])])

    def seconds_left(self, running: Sequence[tuple[Cell, Standing]]) -> float | None:
        """At the pace of this session; None before anything has moved."""
        done = self._won + sum(now.units - self._begun[cell].units for cell, now in running)
        elapsed = self._clock() - self._started
        ahead = sum(work.units for cell, work in self.work.items() if cell not in self._ended)
        ahead -= sum(now.units for _, now in running)
        return ahead * elapsed / done if done > 0 and elapsed > 0 else None

    def _table(self, standings: Mapping[Cell, Standing]) -> Table:
        table = Table.grid(padding=(0, 2))
        for cell, now in standings.items():
            begun = self._begun[cell]
            done = now.units - begun.units
            passed = self._clock() - begun.moment
            left = (now.work.units - now.units) * passed / done if done > 0 else None
            bar = ProgressBar(total=now.work.units, completed=now.units, width=24)
            table.add_row(cell.name, now.text, bar, f"{_span(left)} left" if left is not None else "")
        table.add_row(self.totals(list(standings.items())))
        return table


def _span(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
