"""Peak memory of an update by preset, batch and option: predicted by `tutti plan`, and measured.

python benchmarks/memory.py measures each cell in a process of its own, calibrates what a process holds beside
its tensors on the tiny preset, and checks it on the others. benchmarks/README.md says what each column means.
On a machine with CUDA, benchmarks/throughput.py measures the GPU's memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from frame import DEMO
from memory_cell import ENVIRONMENT, Cell, Measured
from tables import RESULTS, Table, prints_user_errors, publish
from throughput import GPU_ROWS

from tutti.planning.devices import CPU_PROCESS, Precision
from tutti.planning.footprint import fake_update
from tutti.planning.plan import memory_on, sizes_near
from tutti.runs.build import expected_spec
from tutti.runs.provenance import circumstances, made_with
from tutti.runs.terminal import print_line
from tutti.types import UserError

MOST_ERROR = 0.10
BASE = ("training.ema=0.99", "training.device=cpu")
OPTIONS: dict[str, tuple[str, ...]] = {  # beside the precision, which each begins with
    "fp32": (),
    "bf16": (),
    "fp32, recompute": ("training.activation_checkpointing=block",),
    "bf16, recompute": ("training.activation_checkpointing=block",),
    "fp32, accumulation": ("training.accumulation=2",),
    "fp32, adamw": ("training.optimizer.kind=adamw",),
    "bf16, adamw": ("training.optimizer.kind=adamw",),
}
CALIBRATES = "tiny"
ROWS = {"tiny": (8, 32), "small": (2, 32), "base": (4,), "large": (1,)}
MUON = ("fp32", "bf16", "fp32, recompute", "bf16, recompute", "fp32, accumulation")
SLOW = {"base": MUON[:1] + MUON[2:], "large": MUON}
"""Only planned unless `--slow`: a step of Muon takes a core half a minute (base) or several (large)."""

PLANNED_OPTIONS = ("bf16", "bf16, recompute", "bf16, adamw")
"""Planned for a GPU's batches, too, which a CPU does not compute in minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A cell: the tensors that the plan predicts, in bytes, and what was measured."""

    preset: str
    rows: int
    option: str
    tensors: float
    measured: Measured

    @property
    def precision(self) -> Precision:
        """That of the option."""
        return precision_of(self.option)


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Bytes beside the tensors: what a process grew by, and all that it holds, as `Device.process` is."""

    grown: float
    process: float


def precision_of(option: str) -> Precision:
    """An option begins with it."""
    return "bf16" if option.startswith("bf16") else "fp32"


def cell_of(preset: str, rows: int, option: str) -> Cell:
    """The demo's config with this preset, batch and option."""
    own = (f"training.precision={precision_of(option)}", f"model.size={preset}", f"data.batch_size={rows}")
    return Cell(config=str(DEMO), overrides=(*BASE, *own, *OPTIONS[option]), rows=rows)


def planned(cell: Cell) -> float:
    """Peak bytes of the tensors, by the steps of `tutti plan` for one device."""
    config = cell.load()
    accumulation = config.training.accumulation
    with fake_update(config, expected_spec(config)) as (trial, memory):
        sizes = sizes_near(config.data.batch_size * accumulation, 1)
        first, second = (trial.peaks(memory, size, accumulation) for size in sizes)
        parts = trial.parts()
    return memory_on("single", 1, parts, (first, second), config).at(cell.rows)


def in_own_process(cell: Cell) -> Measured:
    """The measured peaks. Raises: UserError if the process fails (out of memory)."""
    script = Path(__file__).with_name("memory_cell.py")
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), json.dumps(asdict(cell))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{cell.overrides}, batch {cell.rows}: exit {done.returncode}: {done.stderr[-500:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def free_memory() -> float:
    """Bytes that a process can get now (Linux)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def calibrated(rows: Sequence[Row]) -> dict[Precision, Beside]:
    """What is beside the tensors, by precision: the mean over the rows."""
    found: dict[Precision, Beside] = {}
    present: set[Precision] = {row.precision for row in rows}
    for precision in sorted(present):
        own = [row for row in rows if row.precision == precision]
        found[precision] = Beside(
            grown=statistics.fmean(row.measured.grown - row.tensors for row in own),
            process=statistics.fmean(row.measured.process - row.tensors for row in own),
        )
    return found


def errors(row: Row, beside: Beside) -> tuple[float, float, float]:
    """Predicted / measured - 1: of live tensors, of what the process grew by, of the whole process."""
    return (
        row.tensors / row.measured.live - 1,
        (row.tensors + beside.grown) / row.measured.grown - 1,
        (row.tensors + beside.process) / row.measured.process - 1,
    )


def memory_table(title: str, rows: Sequence[Row], beside: dict[Precision, Beside]) -> Table:
    """Predicted and measured megabytes, and the errors."""
    lines: list[tuple[str, ...]] = []
    for row in rows:
        found, own = row.measured, beside[row.precision]
        pairs = zip((found.live, found.grown, found.process), errors(row, own), strict=True)
        compared = [text for size, error in pairs for text in (_mb(size), f"{100 * error:+.1f} %")]
        lines.append((row.preset, str(row.rows), row.option, _mb(row.tensors), *compared))
    heads = ("preset", "batch", "option", "plan: tensors MB", "live MB", "error", "grew by MB", "error")
    return Table(title=title, heads=(*heads, "process MB", "error"), rows=tuple(lines))


def planned_table(cells: dict[tuple[str, int, str], float]) -> Table:
    """What was not run."""
    lines = tuple((*map(str, name), _mb(tensors)) for name, tensors in cells.items())
    return Table(
        title="Predicted, not measured",
        heads=("preset", "batch", "option", "plan: tensors MB"),
        rows=lines,
    )


def measured_rows(arguments: argparse.Namespace) -> tuple[list[Row], dict[tuple[str, int, str], float]]:
    """Every cell that fits in this machine's memory and a user's patience, and the plan of the others."""
    found: list[Row] = []
    left: dict[tuple[str, int, str], float] = {}
    presets = [CALIBRATES, *(preset for preset in arguments.presets if preset != CALIBRATES)]
    for preset in presets:
        for size in ROWS[preset]:
            for option in arguments.options:
                cell = cell_of(preset, size, option)
                tensors = planned(cell)
                large = tensors + CPU_PROCESS[precision_of(option)] > 0.92 * free_memory()
                if large or (option in SLOW.get(preset, ()) and not arguments.slow):
                    left[preset, size, option] = tensors
                    continue
                row = Row(
                    **{"preset": preset, "rows": size, "option": option},
                    **{"tensors": tensors, "measured": in_own_process(cell)},
                )
                found.append(row)
                print_line(
                    f"{preset}, {size}, {option}: planned {_mb(tensors)}, live {_mb(row.measured.live)} MB"
                )
    return found, left


def benchmark(arguments: argparse.Namespace) -> bool:
    """Measures, publishes, and says whether every prediction is within 10 % of all measurements."""
    found_in = circumstances()
    rows, left = measured_rows(arguments)
    for preset in arguments.presets:
        for option in PLANNED_OPTIONS:
            left[preset, GPU_ROWS[preset], option] = planned(cell_of(preset, GPU_ROWS[preset], option))
    given = [row for row in rows if row.preset == CALIBRATES]
    held_out = [row for row in rows if row.preset != CALIBRATES]
    beside = calibrated(given)
    live = [errors(row, beside[row.precision])[0] for row in rows]
    grown = [errors(row, beside[row.precision])[1] for row in held_out]
    process = [errors(row, beside[row.precision])[2] for row in held_out]
    passed = all(_within(found) for found in (live, grown, process))
    says = ", ".join(
        f"{name} {_mb(one.grown)} MB grown and {_mb(one.process)} MB in all (the plan takes "
        f"{_mb(CPU_PROCESS[name])})"
        for name, one in beside.items()
    )
    notes = [
        f"Beside the tensors, the mean over {CALIBRATES}: {says}.",
        f"Errors of the plan: {_verdict(live)} of the live tensors, in all rows. Held out, with what "
        f"{CALIBRATES} gave: {_verdict(grown)} of what the process grew by, {_verdict(process)} of the whole "
        f"process. Wanted: at most {100 * MOST_ERROR:.0f} %.",
        f"CPU, one thread. {made_with(found_in)}",
    ]
    result = {
        **found_in,
        "beside": {name: asdict(one) for name, one in beside.items()},
        "cells": [asdict(row) | {"calibrates": row.preset == CALIBRATES} for row in rows],
        "planned": [
            {"preset": preset, "rows": size, "option": option, "tensors": tensors}
            for (preset, size, option), tensors in left.items()
        ],
        "passed": passed,
    }
    tables = [
        memory_table("Peak memory of an update: calibrates", given, beside),
        memory_table("Peak memory of an update: held out", held_out, beside),
        planned_table(left),
    ]
    publish(arguments.output, "benchmarks/memory", [one for one in tables if one.rows], notes, result)
    return passed


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f}"


def _within(found: Sequence[float]) -> bool:
    return max(map(abs, found), default=math.inf) <= MOST_ERROR


def _verdict(found: Sequence[float]) -> str:
    if not found:
        return "nothing measured"
    verdict = "PASS" if _within(found) else "FAIL"
    return f"{100 * min(found):+.1f} to {100 * max(found):+.1f} % ({verdict})"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--slow", action="store_true", help="measure what takes many minutes, too")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory", help="without suffix")
    return parser.parse_args(arguments)


@prints_user_errors
def main(given: Sequence[str] | None = None) -> int:
    """0 if every prediction is within 10 %, 1 if not, 2 for a mistake of the user."""
    return 0 if benchmark(parse(given)) else 1


if __name__ == "__main__":
    sys.exit(main())
