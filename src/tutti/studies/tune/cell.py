"""Trains one rate from one seed for the first steps of a whole training, in its own process.

python -m tutti.studies.tune.cell FOLDER trains what `tutti tune` has described in FOLDER; run again, it
continues. --attached as in tutti.studies.run_cell.
"""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from pydantic import TypeAdapter

from tutti.config.run_config import RunConfig, load_config, to_yaml
from tutti.runs.build import build_training
from tutti.runs.screened_rates import JUDGED_BY
from tutti.storage.files import discard, write_atomically, write_json
from tutti.storage.reading import read_json, read_valid
from tutti.studies.cells import RESULT
from tutti.studies.run_cell import CONFIG, DESCRIPTION, run_process
from tutti.training.faults.non_finite import NonFiniteError
from tutti.training.records import read_records

METRICS = (JUDGED_BY, "valid/metric/*/key_l1")
RESULTS = TypeAdapter(dict[str, float])


@dataclass(frozen=True, slots=True, kw_only=True)
class RateCell:
    """A training at one rate from one seed, of the first `steps` steps; its folder's name has a hash of all
    that it depends on."""

    rate: float
    seed: int
    steps: int
    folder: Path

    @property
    def name(self) -> str:
        """As in "rate 0.005, seed 1"."""
        return f"rate {self.rate:g}, seed {self.seed}"

    def result(self) -> dict[str, float] | None:
        """ "seconds", and the errors on held-out episodes if they are finite; None if it is not finished.

        Raises: UserError if result.json cannot be read.
        """
        path = self.folder / RESULT
        return read_valid(path, RESULTS.validate_python, "Delete it.") if path.is_file() else None

    def describe(self, config: RunConfig) -> None:
        """Writes the files that the cell's process reads."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / CONFIG, to_yaml(config))
        write_json(self.folder / DESCRIPTION, {"steps": self.steps})


class _Enough(Exception):
    """The last step that is wanted is recorded and validated."""


def run_cell(folder: Path) -> None:
    """Trains in this process up to the described step of its schedule, and writes result.json."""
    config, last = load_config(folder / CONFIG), int(read_json(folder / DESCRIPTION)["steps"])
    torch.set_num_threads(1)

    def stop(step: int, steps: int, latest: dict[str, float]) -> None:
        if step >= last:
            raise _Enough

    training = build_training(config, folder)
    with suppress(_Enough, NonFiniteError):
        training.fit(stop)
    seconds = {"seconds": training.trainer.counters.seconds}
    write_json(folder / RESULT, seconds | held_out(folder, last))
    discard(folder / "checkpoints")  # nothing reads them now, and there are as many as trainings


def held_out(folder: Path, step: int) -> dict[str, float]:
    """The finite errors of this step's validation, by METRICS; none if the training did not come so far."""
    return {
        name: value
        for record in read_records(folder)
        if record["kind"] == "validation" and record["step"] == step
        for name, value in record.items()
        if any(fnmatchcase(name, pattern) for pattern in METRICS) and math.isfinite(value)
    }


if __name__ == "__main__":
    sys.exit(run_process(run_cell, Path(sys.argv[1]), attached="--attached" in sys.argv[2:]))
