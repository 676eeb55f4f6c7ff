"""Peak memory of an update by preset, batch and option: predicted by `tutti plan`, and measured.

python benchmarks/memory.py measures each cell in a process of its own. benchmarks/README.md says what each
column means. On a machine with CUDA, benchmarks/throughput.py measures the GPU's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from frame import DEMO
from memory_cell import ENVIRONMENT, Cell, Measured
from tables import RESULTS, Table, circumstances, made_with, publish

from tutti.pipeline import expected_spec
from tutti.planning.footprint import imagined
from tutti.terminal import say
from tutti.types import UserError

MOST_ERROR = 0.10
BASE = ("training.ema=0.99", "training.precision=fp32", "training.device=cpu")
OPTIONS: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "bf16": ("training.precision=bf16",),
    "fp32, recompute": ("training.activation_checkpointing=block",),
    "bf16, recompute": ("training.precision=bf16", "training.activation_checkpointing=block"),
    "fp32, accumulation": ("training.accumulation=2",),
}
ROWS = {"tiny": (8, 32), "small": (2, 8), "base": (2,)}


def cells(presets: Sequence[str], options: Sequence[str]) -> dict[tuple[str, int, str], Cell]:
    """Every preset with its batches and options, by (preset, rows, option)."""
    return {
        (preset, rows, option): Cell(
            config=str(DEMO), overrides=(*BASE, f"model.size={preset}", *OPTIONS[option]), rows=rows
        )
        for preset in presets
        for rows in ROWS[preset]
        for option in options
    }


def predicted(cell: Cell) -> int:
    """The peak of the second update, from fake tensors."""
    config = cell.load()
    with imagined(config, expected_spec(config)) as (rehearsed, memory):
        return rehearsed.peaks(memory, cell.rows, config.training.accumulation).peak


def in_own_process(cell: Cell) -> Measured:
    """The measured peaks. Raises: UserError if the process fails (out of memory)."""
    script = Path(__file__).with_name("memory_cell.py")
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), json.dumps(asdict(cell))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{cell.overrides}, batch {cell.rows}: exit {done.returncode}: {done.stderr[-500:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def memory_table(rows: dict[tuple[str, int, str], tuple[int, Measured]]) -> Table:
    """Predicted and measured bytes."""
    lines = [
        (
            *(preset, str(size), option, f"{expected / 1e6:.1f}", f"{found.live / 1e6:.1f}"),
            *(f"{100 * (expected / found.live - 1):+.1f} %", f"{found.process / 1e6:.1f}"),
            f"{100 * (expected / found.process - 1):+.1f} %",
        )
        for (preset, size, option), (expected, found) in rows.items()
    ]
    heads = ("preset", "batch", "option", "predicted MB", "live MB", "error", "process MB", "error")
    return Table(title="Peak memory of an update", heads=heads, rows=tuple(lines))


def benchmark(arguments: argparse.Namespace) -> bool:
    """Measures, publishes, and says whether every prediction is within 10 % of both measurements."""
    found_in = circumstances()
    rows: dict[tuple[str, int, str], tuple[int, Measured]] = {}
    for name, cell in cells(arguments.presets, arguments.options).items():
        rows[name] = (predicted(cell), in_own_process(cell))
        expected, found = rows[name]
        say(f"{name}: predicted {expected / 1e6:.1f}, live {found.live / 1e6:.1f} MB")
    live = [expected / found.live - 1 for expected, found in rows.values()]
    process = [expected / found.process - 1 for expected, found in rows.values()]
    passed = _within(live) and _within(process)
    notes = [
        f"Error of the prediction: {_verdict(live)} of the live tensors, which the same code counts; "
        f"{_verdict(process)} of what the process grew by, the check from outside. Wanted: at most "
        f"{100 * MOST_ERROR:.0f} %.",
        f"CPU, one thread. {made_with(found_in)}",
    ]
    result = {
        **found_in,
        "cells": [
            {"preset": preset, "rows": size, "option": option, "predicted": expected, **asdict(found)}
            for (preset, size, option), (expected, found) in rows.items()
        ],
        "passed": passed,
    }
    publish(arguments.output, "benchmarks/memory", [memory_table(rows)], notes, result)
    return passed


def _within(errors: Sequence[float]) -> bool:
    return max(map(abs, errors)) <= MOST_ERROR


def _verdict(errors: Sequence[float]) -> str:
    found = "PASS" if _within(errors) else "FAIL"
    return f"{100 * min(errors):+.1f} to {100 * max(errors):+.1f} % ({found})"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", choices=ROWS, default=["tiny", "small"])
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--output", type=Path, default=RESULTS / "memory", help="without suffix")
    return parser.parse_args(arguments)


def main(given: Sequence[str] | None = None) -> int:
    """0 if every prediction is within 10 %, 1 if not, 2 for a mistake of the user."""
    try:
        return 0 if benchmark(parse(given)) else 1
    except UserError as error:
        say(f"error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
