"""Records of a run: one JSON object a line in records.jsonl, and the same values for TensorBoard."""

from __future__ import annotations

import json
import math
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from torch.utils.tensorboard.writer import SummaryWriter

from tutti.training.checkpoint import disk_error, write_text_atomically
from tutti.types import UserError

METRICS: dict[str, str] = {
    "loss/total": "L_total = sum_i lambda_i L_i, mean over the steps since the last record.",
    "loss/*/raw": "The term L_i before its lambda, mean over the steps since the last record.",
    "loss/*/weighted": "lambda_i L_i, mean over the steps since the last record.",
    "lambda/*": "The weight lambda_i of the term in the total.",
    "metric/*": "What a term reports besides its value; its name starts with the term's. Not in the total.",
    "metric/action/first_l1": "Masked mean |a^_0 - a_0| of the first action of the chunk, normalised units.",
    "metric/align/floor": "Least value the align term can take here: mean_i log(number of positives of i).",
    "metric/align/above_floor": "The align term minus its floor: 0 is perfect.",
    "metric/align/chance": "log(number of samples): the align term of a model that knows nothing.",
    "metric/align/accuracy": "Share of samples whose best match has the same instruction, both ways, 0 to 1.",
    "metric/align/temperature": "exp(-g): what the similarities are divided by.",
    "metric/align/skipped": "Share of batches with under two distinct instructions, where align is masked.",
    "metric/recon/changed_share": "Share of future patches that changed by more than the threshold, 0 to 1.",
    "metric/recon/copy_baseline": "The recon term if the present picture were the prediction.",
    "metric/state/hold_baseline": "The state term if the hand stayed where it is.",
    "metric/state/key_l1": "The part of the state term that belongs to the next key frame.",
    "optim/lr": "Learning rate of the step: of Muon's matrices if Muon is used, else of AdamW.",
    "optim/lr_adamw": "With Muon: the learning rate of the parameters that AdamW moves.",
    "optim/lr_factor": "What the schedule multiplies every base learning rate with, 0 to 1.",
    "optim/grad_norm": "Euclidean norm of the whole gradient before clipping, mean since the last record.",
    "optim/grad_norm_max": "Largest such norm since the last record.",
    "optim/clip_share": "Share of the steps since the last record whose gradient was clipped, 0 to 1.",
    "optim/ema_decay": "Decay d of the moving average at this step: min(decay, (1 + s)/(10 + s)).",
    "data/samples": "Training windows consumed since the start of the run.",
    "time/seconds": "Seconds spent training since the start of the run, resumed parts included.",
    "time/samples_per_second": "Windows per second since the last record, validation and saving excluded.",
    "time/data_share": "Share of that time spent waiting for a batch and moving it to the device.",
    "time/forward_share": "Share of that time in model and objective.",
    "time/backward_share": "Share of that time in the backward pass.",
    "time/optimizer_share": "Share of that time in clipping, the optimiser's step and the moving average.",
    "valid/*": "The term (or total) on held-out episodes with the averaged weights (raw ones if EMA is off).",
    "valid/metric/*": "What a term reports besides, on held-out episodes.",
    "valid_raw/*": "The term (or total) on held-out episodes with the raw weights.",
    "valid_raw/metric/*": "What a term reports besides, on held-out episodes with the raw weights.",
    "time/validation_seconds": "Seconds that the validation took.",
}
"""Every metric that a run can record, by name; `*` stands for a term (or a term's metric)."""


def describe_metric(name: str) -> str | None:
    """The description of a recorded metric, or None if METRICS has no line for it."""
    if name in METRICS:
        return METRICS[name]
    fitting = [pattern for pattern in METRICS if fnmatchcase(name, pattern)]
    return METRICS[max(fitting, key=len)] if fitting else None


class Recorder:
    """Appends to run/records.jsonl, flushing each line, and to event files in run/tensorboard.

    Opened at `after_step`, it first drops the records of later steps (and a line that a kill cut short), so
    that each step is recorded once, however often a run is interrupted.

    Raises: UserError if the disk is full; ValueError for a metric that METRICS does not describe.
    """

    def __init__(self, run: Path, after_step: int = 0) -> None:
        self.path = run / "records.jsonl"
        run.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_records(run) if record["step"] <= after_step]
        write_text_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file: IO[str] = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=after_step + 1)

    def write(self, step: int, kind: Literal["train", "validation"], values: dict[str, float]) -> None:
        """Record the values after `step` updates."""
        unknown = [name for name in values if describe_metric(name) is None]
        if unknown:
            raise ValueError(f"{unknown} have no line in tutti.training.record.METRICS; add one for each.")
        try:
            self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        except OSError as error:
            raise disk_error(error, self.path) from error

    def close(self) -> None:
        """Flush and close all files."""
        try:
            self._file.close()
            self._board.close()
        except OSError as error:
            raise disk_error(error, self.path) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_records(run: Path) -> list[dict[str, Any]]:
    """All whole records of a run in order; an unfinished last line is left out.

    Raises: UserError if a line other than the last is not a record.
    """
    path = run / "records.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "step" not in record:
                raise ValueError("no record with a step")
            records.append(record)
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not a record ({error}). Delete this line.") from error
    return records


class Meter:
    """Collects values step by step and gives their means (or maxima, names ending in _max)."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, float]) -> None:
        """Take in one step's values; a value may be missing in some steps."""
        for name, value in values.items():
            if name.endswith("_max"):
                self.sums[name] = max(value, self.sums.get(name, -math.inf))
                self.counts[name] = 1
            else:
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means (maxima) since the last call; then start anew."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means

    def state(self) -> dict[str, Any]:
        """What a checkpoint between two records must keep."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])
