"""The files of a run's folder, read so that a missing, torn or foreign file never stops the report.

Each file is read by the class that wrote it, so the sections of the report know its form.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import TypeAdapter, ValidationError

from tutti.evaluation.closed_loop.results import EvaluationResult
from tutti.evaluation.closed_loop.rollouts import Condition
from tutti.evaluation.open_loop import OpenLoopResult
from tutti.evaluation.probes.run import ProbeResult
from tutti.models.describe import Description
from tutti.storage.reading import (
    MAX_BYTES,
    YAML_BYTES,
    parse_json,
    parse_value,
    parse_yaml,
    read_bytes,
    read_lines,
    shown,
)
from tutti.types import UserError

MAX_PICTURE = 2**23
"""Bytes of a picture that is put into the page."""
MAX_STEP = 2**53
"""Steps beyond this are no steps."""
Json = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """The training records as columns: for each metric the steps at which it was written and its values.

    `restarts` are the steps at which a line's step was not above the one before it: the run was resumed. The
    later line of a step counts. A value that is not finite is kept as NaN, and `not_finite` names it.
    """

    columns: Mapping[str, tuple[list[int], list[float]]]
    restarts: tuple[int, ...]
    not_finite: tuple[str, ...]
    broken_lines: int

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def get(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values), both empty if nothing of that name was recorded."""
        return self.columns.get(name, ([], []))

    def last(self, name: str) -> float | None:
        """The newest finite value."""
        return next((v for v in reversed(self.get(name)[1]) if math.isfinite(v)), None)

    def mean(self, name: str) -> float | None:
        """The mean of the finite values."""
        values = [v for v in self.get(name)[1] if math.isfinite(v)]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """An entry of stages.json."""

    seconds: float
    finished: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The part of summary.json that the run's other files do not say."""

    name: str = ""
    seconds: float = 0.0
    versions: Json = field(default_factory=dict)
    machine: Json = field(default_factory=dict)
    commit: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """recording.json: for each task the starts that the expert tried and those in which it succeeded."""

    seeds: tuple[int, int]
    tries: dict[str, int]
    successes: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoEntry:
    """A rollout's entry of videos/index.json."""

    file: str
    task: str
    success: bool = False
    seed: int | None = None
    decisions: int | None = None
    instruction: str = ""
    condition: Condition = "policy"


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoIndex:
    """videos/index.json."""

    videos: tuple[VideoEntry, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """probes/probes.json: what was probed, and its results."""

    checkpoint: str
    result: ProbeResult

    @classmethod
    def from_dict(cls, values: Json) -> Self:
        """The content of the file."""
        return cls(
            checkpoint=str(values["checkpoint"]), result=TypeAdapter(ProbeResult).validate_python(values)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The files of a run. An absent file is None (or empty); `problems` says what could not be read."""

    folder: Path
    records: Records
    evaluation: EvaluationResult | None
    open_loop: OpenLoopResult | None
    summary: Summary
    stages: Mapping[str, Stage]
    config_text: str | None
    model: Description | None
    data: Json | None
    recording: Recording | None
    videos: tuple[VideoEntry, ...]
    first_batch: bytes | None
    probes: Probed | None
    occlusion: bytes | None
    failures: tuple[str, ...]
    problems: tuple[str, ...]


def read_inputs(folder: Path) -> Inputs:
    """Reads a run's folder. Raises nothing but FileNotFoundError, if the folder itself is absent."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a run folder: it does not exist. `tutti train` makes one.")
    problems: list[str] = []

    def read(name: str, parse: Callable[[Json], T]) -> T | None:
        return _parsed(folder, name, parse, problems)

    config = _bytes(folder / "config.yaml", problems, YAML_BYTES)
    videos = read("videos/index.json", TypeAdapter(VideoIndex).validate_python)
    return Inputs(
        folder=folder,
        records=read_records(folder / "records.jsonl", problems),
        evaluation=read("evaluation/results.json", EvaluationResult.from_dict),
        open_loop=read("evaluation/open_loop.json", TypeAdapter(OpenLoopResult).validate_python),
        summary=read("summary.json", TypeAdapter(Summary).validate_python) or Summary(),
        stages=read("stages.json", TypeAdapter(dict[str, Stage]).validate_python) or {},
        config_text=None if config is None else config.decode("utf-8", errors="replace"),
        model=read("model.json", TypeAdapter(Description).validate_python),
        data=read("data.json", dict),
        recording=read("recording.json", TypeAdapter(Recording).validate_python),
        videos=videos.videos if videos is not None else (),
        first_batch=_picture(folder, "first_batch.png", problems),
        probes=read("probes/probes.json", Probed.from_dict),
        occlusion=_picture(folder, "probes/occlusion.png", problems),
        failures=tuple(_failures(folder, problems)),
        problems=tuple(problems),
    )


def config_of(inputs: Inputs, section: str | None = None) -> Json:
    """The config, or a section of it, as plain values; empty where there is none or it is not YAML."""
    values = _yaml(inputs.config_text or "")
    if section is not None:
        values = values.get(section) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def config_value(config: Any, *keys: str) -> Any:
    """The value at a path of a config; None where there is none."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config


@functools.lru_cache(maxsize=8)
def _yaml(text: str) -> Any:
    try:
        return parse_yaml(text, "config.yaml")
    except UserError:
        return None


def _failures(folder: Path, problems: list[str]) -> Iterator[str]:
    """One sentence for each update that stopped the training, or was skipped, on a non-finite value."""
    for path in sorted((folder / "failures").glob("step-*/failure.json")):
        about = _parsed(folder, str(path.relative_to(folder)), dict, problems) or {}
        step = about.get("step", "?")
        yield (
            (f"Step {step} was skipped" if about.get("skipped") else f"Training stopped before step {step}")
            + f": {about.get('term', 'a value')} was {about.get('value', 'not finite')}. "
            f"Batch and weights are in failures/{path.parent.name}."
        )


def read_records(path: Path, problems: list[str]) -> Records:
    """JSON lines with `step` and numbers; a line torn by a kill, or no object, is counted and left out."""
    columns: dict[str, dict[int, float]] = {}
    restarts: list[int] = []
    broken, before = 0, -1
    for line in _lines(path, problems):
        try:
            fields = parse_json(line or "", path.name)
            step = int(fields["step"])
            numbers = _numbers(fields)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            broken += line is None or bool(line.strip())
            continue
        if abs(step) > MAX_STEP:
            broken += 1
            continue
        if step < before:
            restarts.append(step)
        before = step
        for name, value in numbers:
            columns.setdefault(name, {})[step] = value
    ordered = {name: (sorted(c), [c[s] for s in sorted(c)]) for name, c in columns.items()}
    bad = tuple(n for n, (_, values) in ordered.items() if not all(map(math.isfinite, values)))
    return Records(columns=ordered, restarts=tuple(restarts), not_finite=bad, broken_lines=broken)


def _numbers(fields: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    numbers: list[tuple[str, float]] = []
    for name, value in fields.items():
        if name == "step":
            continue
        if isinstance(value, Mapping):
            # {"step": 3, "metrics": {"loss/total": ...}} and the flat form mean the same.
            numbers += _numbers(value, "" if name in ("metrics", "values") else f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers.append((prefix + name, float(value) if math.isfinite(float(value)) else math.nan))
        elif value is None or value in ("NaN", "Infinity", "-Infinity", "nan", "inf", "-inf"):
            numbers.append((prefix + name, math.nan))
    return numbers


def _lines(path: Path, problems: list[str]) -> Iterator[str | None]:
    try:
        if os.path.lexists(path):
            yield from read_lines(path)
    except UserError as error:
        problems.append(f"{path.name} could not be read: {error}")


def _bytes(path: Path, problems: list[str], most: int = MAX_BYTES) -> bytes | None:
    try:
        return read_bytes(path, most) if os.path.lexists(path) else None
    except UserError as error:
        problems.append(f"{path.name} could not be read: {error}")
        return None


def _picture(folder: Path, name: str, problems: list[str]) -> bytes | None:
    """A picture that goes into the page as it is, so it must be the run's own: no link to elsewhere."""
    path = folder / name
    if not is_inside(path, folder):
        problems.append(f"{name} is a link that leads out of the run's folder; it is left out")
        return None
    return _bytes(path, problems, MAX_PICTURE)


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a file lies in `folder` also after links are followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _parsed(folder: Path, name: str, parse: Callable[[Json], T], problems: list[str]) -> T | None:
    """The content of a JSON file; a problem and None if it cannot be read or has another form."""
    path = folder / name
    try:
        content = _bytes(path, problems)
        value = None if content is None else parse_value(content.decode("utf-8"), path.name)
        return None if value is None else parse(value)
    except UserError as error:
        reason = str(error)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        reason = f"{path.name}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        reason = f"{path.name}: {type(error).__name__}: {error}"
    problems.append(f"{shown(reason.rstrip('.'), 300, quoted=False)}. Its part of this page is left out")
    return None
