"""Records of a run: one JSON object a line in records.jsonl, the same for its trackers; the step timer."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Any, Literal, Self

import yaml

from tutti.nested_dicts import without_addresses
from tutti.storage.files import explain_disk_errors, require_writable, write_atomically
from tutti.storage.manifest import CONFIG
from tutti.storage.reading import parse_json, parse_yaml, read_lines
from tutti.trackers import LoggerConfig, Start, TensorBoardConfig, Trackers
from tutti.training.metric_names import describe_metric
from tutti.types import UserError

DELETE = "Delete this line."
Kind = Literal["train", "validation", "evaluation", "diagnostics", "event"]


class MetricsWriter:
    """Appends to run/records.jsonl, flushing each line, and tells the run's trackers, which begin with the
    config in `texts`.

    What survives a power cut is what a checkpoint stands behind: `Saver` syncs the records before it.

    Opened at `after_step`, it first drops the records of later steps (and a line that a kill cut short), so
    that each step is recorded once, however often a run is interrupted. `rollbacks` is the number of
    roll-backs that led to this step: events of later ones are dropped too, since the run comes to them again.

    Raises: UserError if the disk is full; ValueError for a metric that METRICS does not describe.
    """

    def __init__(
        self,
        run: Path,
        after_step: int = 0,
        *,
        rollbacks: int = 0,
        silent: bool = False,
        loggers: Sequence[LoggerConfig] = (TensorBoardConfig(),),
        texts: Mapping[str, str] = {},
    ) -> None:
        """`silent`: records nothing, on all ranks but rank 0, which records the means over all."""
        self.path, self._silent = run / "records.jsonl", silent
        self._wall, self._files = 0.0, ExitStack()
        if silent:
            return
        require_writable(run)
        self._open(after_step, rollbacks)
        config = parse_yaml(texts.get(CONFIG, "{}"), CONFIG)
        name = config.get("name", run.name)
        self._trackers = Trackers(loggers, Start(run=run, name=name, step=after_step, config=config))
        if CONFIG in texts:
            shared = without_addresses(config)
            text = texts[CONFIG] if shared == config else yaml.safe_dump(shared, sort_keys=False)
            self._trackers.text("config", text, after_step)

    def rewind(self, after_step: int, *, rollbacks: int) -> None:
        """Drop the records of later steps: the run goes on from `after_step` again."""
        if not self._silent:
            self._files.close()
            self._open(after_step, rollbacks)
            self._trackers.rewind(after_step)

    def _open(self, after_step: int, rollbacks: int) -> None:
        records = [
            record
            for record in read_records(self.path.parent)
            if record["step"] <= after_step
            and ("optim/rollback_from" not in record or record["optim/rollbacks"] <= rollbacks)
        ]
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in records))
        self._file = self._files.enter_context(self.path.open("a", encoding="utf-8"))

    def write(self, step: int, kind: Kind, values: dict[str, float]) -> None:
        """Record the values after `step` updates."""
        if self._silent:
            return
        unknown = [name for name in values if describe_metric(name) is None]
        if unknown:
            raise ValueError(f"{unknown} are not in tutti.training.metric_names.METRICS; add them.")
        with explain_disk_errors(self.path):
            self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
            self._file.flush()
        self._wall = max(self._wall, time.time())  # a clock that is set back would disorder the curves
        self._trackers.scalars(step, kind, values, self._wall)

    def close(self) -> None:
        """Flush and close all files, and wait a while for the trackers."""
        if not self._silent:
            self._trackers.close()
        with explain_disk_errors(self.path):
            self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_records(run: Path) -> list[dict[str, Any]]:
    """All whole records of a run in order; an unfinished last line is left out.

    Raises: UserError if a line other than the last is not a record.
    """
    path = run / "records.jsonl"
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    torn: UserError | None = None
    for number, line in enumerate(read_lines(path), start=1):
        if torn is not None:
            raise torn
        try:
            record = parse_json("" if line is None else line, f"{path}, line {number}", cure=DELETE)
            if type(record.get("step")) is not int or not isinstance(record.get("kind"), str):
                raise UserError(f"{path}, line {number}: no record with a step and a kind. {DELETE}")
            records.append(record)
        except UserError as error:
            torn = error
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

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint between two records must keep."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: Any) -> None:
        """Continue from `state`."""
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])


PARTS: tuple[str, ...] = ("data", "forward", "backward", "optimizer", "diagnostics")


class StepTimer:
    """Times steps and their parts, by a clock that never runs backwards.

    On a GPU the host waits once in a step, for the loss terms and the gradient norm behind the backward pass.
    "forward" is then the time to queue the forward pass, and "backward" holds the work of both.
    """

    def __init__(self) -> None:
        self._started = self._lap = monotonic()
        self._since = 0.0
        self._parts = dict.fromkeys(PARTS, 0.0)

    def start(self) -> None:
        """Begin a step."""
        self._started = self._lap = monotonic()

    def lap(self, part: str) -> None:
        """Count the time since the last lap as that of one of PARTS."""
        now = monotonic()
        self._parts[part] += now - self._lap
        self._lap = now

    def stop(self) -> float:
        """End a step. Gives its seconds."""
        elapsed = monotonic() - self._started
        self._since += elapsed
        return elapsed

    def take(self, samples: int) -> dict[str, float]:
        """Rate and shares since the last call, in which `samples` windows were consumed; then start anew."""
        since = max(self._since, 1e-9)
        shares = {f"time/{name}_share": spent / since for name, spent in self._parts.items()}
        self._since, self._parts = 0.0, dict.fromkeys(PARTS, 0.0)
        return {"time/samples_per_second": samples / since, **shares}
