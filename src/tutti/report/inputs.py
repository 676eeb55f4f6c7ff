"""The files of a run's folder, read so that a missing, torn or foreign file never stops the report.

Each file is read by the class that wrote it, so the sections of the report know its form.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from tutti.evaluation.closed_loop.results import EvaluationResult
from tutti.evaluation.closed_loop.rollouts import Condition
from tutti.evaluation.open_loop import OpenLoopResult
from tutti.evaluation.probes.run import ProbeResult
from tutti.findings import Finding
from tutti.models.describe import Description
from tutti.report.records import Records
from tutti.storage.reading import (
    YAML_BYTES,
    parse_json,
    parse_value,
    parse_yaml,
    read_bytes,
    read_lines,
    read_text,
    shown,
)
from tutti.types import UserError

MAX_PICTURE = 2**23
"""Bytes of a picture that is put into the page."""
VIDEOS = "evaluation/videos"
READ = (
    *(
        "*.json",
        "records.jsonl",
        "config.yaml",
        "first_batch.png",
        "evaluation/*.json",
        f"{VIDEOS}/index.json",
    ),
    *("evaluations/*/results.json", "probes/probes.json", "probes/occlusion.png"),
    "failures/step-*/failure.json",
)
"""The files of a run that `read_inputs` reads, as patterns."""
MAX_STEP = 2**53
"""Steps beyond this are no steps."""
Json = dict[str, Any]
T = TypeVar("T")


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
    """A rollout's entry of evaluation/videos/index.json."""

    file: str
    task: str
    success: bool = False
    seed: int | None = None
    decisions: int | None = None
    instruction: str = ""
    condition: Condition = "policy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed(ProbeResult):
    """probes/probes.json: the results, and what was probed."""

    checkpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The files of a run. An absent file is None (or empty); `problems` says what could not be read."""

    folder: Path
    records: Records
    evaluation: EvaluationResult | None
    other_evaluations: Mapping[str, EvaluationResult]
    open_loop: OpenLoopResult | None
    summary: Summary
    stages: Mapping[str, Stage]
    config_text: str
    config: Json
    model: Description | None
    data: Json | None
    data_findings: tuple[Finding, ...]
    recording: Recording | None
    videos: tuple[VideoEntry, ...]
    first_batch: bytes | None
    first_texts: tuple[tuple[int, str], ...]
    probes: Probed | None
    occlusion: bytes | None
    failures: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Stage -> seconds; a stage of no time is left out."""
        return {name: stage.seconds for name, stage in self.stages.items() if stage.seconds > 0}


def read_inputs(folder: Path) -> Inputs:
    """Reads a run's folder. Raises nothing but FileNotFoundError, if the folder itself is absent."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a run folder: it does not exist. `tutti train` makes one.")
    problems: list[str] = []

    def read(name: str, how: Callable[[Path], T]) -> T | None:
        return _attempt(folder / name, how, problems)

    def json_of(name: str, parse: Callable[[Any], T]) -> T | None:
        return read(name, lambda path: parse(parse_value(read_text(path, inside=folder), path.name)))

    raw = read("config.yaml", partial(own_bytes, folder=folder, most=YAML_BYTES)) or b""
    text = raw.decode("utf-8", errors="replace")
    config: Any = None
    with suppress(UserError):
        config = parse_yaml(text, "config.yaml")
    picture = partial(own_bytes, folder=folder, most=MAX_PICTURE)
    failures = sorted((folder / "failures").glob("step-*/failure.json"))
    return Inputs(
        folder=folder,
        records=read("records.jsonl", read_records) or Records(columns={}),
        evaluation=json_of("evaluation/results.json", EvaluationResult.from_dict),
        other_evaluations={
            path.parent.name: result
            for path in sorted((folder / "evaluations").glob("*/results.json"))
            if (result := json_of(str(path.relative_to(folder)), EvaluationResult.from_dict)) is not None
        },
        open_loop=json_of("evaluation/open_loop.json", TypeAdapter(OpenLoopResult).validate_python),
        summary=json_of("summary.json", TypeAdapter(Summary).validate_python) or Summary(),
        stages=json_of("stages.json", TypeAdapter(dict[str, Stage]).validate_python) or {},
        config_text=text,
        config=config if isinstance(config, dict) else {},
        model=json_of("model.json", TypeAdapter(Description).validate_python),
        data=json_of("data.json", dict),
        data_findings=json_of("data_findings.json", TypeAdapter(tuple[Finding, ...]).validate_python) or (),
        recording=json_of("recording.json", TypeAdapter(Recording).validate_python),
        videos=json_of(f"{VIDEOS}/index.json", _videos) or (),
        first_batch=read("first_batch.png", picture),
        first_texts=json_of("first_batch.json", TypeAdapter(tuple[tuple[int, str], ...]).validate_python)
        or (),
        probes=json_of("probes/probes.json", TypeAdapter(Probed).validate_python),
        occlusion=read("probes/occlusion.png", picture),
        failures=tuple(
            _failure(path, json_of(str(path.relative_to(folder)), dict) or {}) for path in failures
        ),
        problems=tuple(problems),
    )


def _attempt(path: Path, read: Callable[[Path], T], problems: list[str]) -> T | None:
    """`read(path)`; None where there is no such file, and with a problem where it has another form."""
    try:
        return read(path) if os.path.lexists(path) else None
    except UserError as error:
        reason = str(error)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        reason = f"{path.name}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        reason = f"{path.name}: {type(error).__name__}: {error}"
    problems.append(f"{shown(reason.rstrip('.'), 300, quoted=False)}. Its part of this page is left out")
    return None


def own_bytes(path: Path, folder: Path, most: int) -> bytes:
    """A file that goes into the page as it is, so it must lie in `folder` also after links are followed.

    Raises: UserError if it does not, or as `read_bytes`.
    """
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        name = path.relative_to(folder)
        raise UserError(f"{name} is a link that leads out of the run's folder; it is left out.")
    return read_bytes(path, most)


def _videos(index: Any) -> tuple[VideoEntry, ...]:
    return TypeAdapter(tuple[VideoEntry, ...]).validate_python(index["videos"])


def _failure(path: Path, about: Json) -> str:
    """What is said of an update that stopped the training, or was skipped, on a non-finite value."""
    step = about.get("step", "?")
    head = f"Step {step} was skipped" if about.get("skipped") else f"Training stopped before step {step}"
    what = f"{about.get('term', 'a value')} was {about.get('value', 'not finite')}"
    return f"{head}: {what}. Batch and weights are in failures/{path.parent.name}."


def read_records(path: Path) -> Records:
    """JSON lines with `step` and numbers; a line torn by a kill, or no object, is counted and left out.

    Raises: UserError if the file cannot be read.
    """
    columns: dict[str, dict[int, float]] = {}
    restarts: list[int] = []
    broken, before = 0, -1
    for line in read_lines(path):
        try:
            fields = parse_json(line or "", path.name)
            step = int(fields.pop("step"))
            numbers = {name: float(value) for name, value in fields.items() if type(value) in (int, float)}
            if abs(step) > MAX_STEP:
                raise ValueError("no step")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            broken += line is None or bool(line.strip())
            continue
        if step < before:
            restarts.append(step)
        before = step
        for name, value in numbers.items():
            columns.setdefault(name, {})[step] = value if math.isfinite(value) else math.nan
    ordered = {name: (sorted(c), [c[s] for s in sorted(c)]) for name, c in columns.items()}
    bad = tuple(n for n, (_, values) in ordered.items() if not all(map(math.isfinite, values)))
    return Records(columns=ordered, restarts=tuple(restarts), not_finite=bad, broken_lines=broken)


def config_value(config: Any, *keys: str) -> Any:
    """The value at a path of a config; None where there is none."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config
