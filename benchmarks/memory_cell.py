"""One measurement of memory in a process of its own: python memory_cell.py CELL prints bytes as JSON."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tutti.config.run_config import RunConfig, load_config
from tutti.planning.footprint import LiveMemory, TrialUpdate
from tutti.runs.build import expected_spec

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Makes the C library give freed tensors back at once, so that the process holds what lives and no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A config with overrides, and a micro-batch."""

    config: str
    overrides: tuple[str, ...]
    rows: int

    def load(self) -> RunConfig:
        """The config of this cell."""
        return load_config(self.config, list(self.overrides))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Peak bytes of an update: of live tensors, of the whole process, and what the process grew by since the
    model was built."""

    live: int
    grown: int
    process: int


def measure(cell: Cell) -> Measured:
    """Two updates of real tensors; the peak of the second."""
    config = cell.load()
    _warm_up()
    before = _resident("VmRSS")
    with LiveMemory() as memory:
        one = TrialUpdate(config, expected_spec(config))
        accumulation = config.training.accumulation
        one.peaks(memory, cell.rows, accumulation)  # the optimiser's state, and what libraries keep
        forget_peak()
        found = one.peaks(memory, cell.rows, accumulation)
        process = resident_peak()
        return Measured(live=found.peak, grown=process - before, process=process)


def _warm_up() -> None:
    """What libraries allocate at their first operation is no part of the growth."""
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    torch.nn.Conv2d(3, 8, 3)(x).sum().backward()
    torch.mm(torch.randn(64, 64), torch.randn(64, 64))


def forget_peak() -> None:
    """The highest resident size is from now on what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_peak() -> int:
    """The highest resident size of this process, in bytes (Linux)."""
    return _resident("VmHWM")


def _resident(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    given = json.loads(sys.argv[1])
    print(json.dumps(asdict(measure(Cell(**given | {"overrides": tuple(given["overrides"])})))))
