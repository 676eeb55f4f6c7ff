"""What a run has left in its folder, read so that a missing, torn or foreign file never stops the report."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutti.storage.reading import (
    MAX_BYTES,
    YAML_BYTES,
    parse_json,
    parse_value,
    parse_yaml,
    read_bytes,
    read_lines,
)
from tutti.types import UserError

MAX_PICTURE = 2**23
"""Bytes of a picture that is put into the page."""
MAX_STEP = 2**53
"""Steps beyond this are no steps."""
Json = dict[str, Any]


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
class Inputs:
    """What the page is made of. An absent file is None (or empty); `problems` says what could not be read."""

    folder: Path
    records: Records
    results: Json | None
    open_loop: Json | None
    summary: Json | None
    stages: Json | None
    config_text: str | None
    model: Json | None
    data: Json | None
    recording: Json | None
    videos: tuple[Json, ...]
    first_batch: bytes | None
    probes: Json | None
    occlusion: bytes | None
    failures: tuple[str, ...]
    problems: tuple[str, ...]


def read_inputs(folder: Path) -> Inputs:
    """Read the run's folder. Raises nothing but FileNotFoundError, where the folder itself is absent."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a run folder: it does not exist. `tutti train` makes one.")
    problems: list[str] = []
    records = read_records(folder / "records.jsonl", problems)
    videos = _json(folder / "videos" / "index.json", problems)
    videos = videos.get("videos") if isinstance(videos, dict) else videos
    config = _bytes(folder / "config.yaml", problems, YAML_BYTES)
    results = _object(folder / "evaluation" / "results.json", problems)
    summary = _object(folder / "summary.json", problems)
    open_loop = _object(folder / "evaluation" / "open_loop.json", problems)
    for source in (results, summary):
        inner = (source or {}).get("open_loop")
        open_loop = inner if open_loop is None and isinstance(inner, dict) else open_loop
    return Inputs(
        folder=folder,
        records=records,
        results=results,
        open_loop=open_loop,
        summary=summary,
        stages=_object(folder / "stages.json", problems),
        config_text=None if config is None else config.decode("utf-8", errors="replace"),
        model=_object(folder / "model.json", problems),
        data=_object(folder / "data.json", problems),
        recording=_object(folder / "recording.json", problems),
        videos=tuple(v for v in videos if isinstance(v, dict)) if isinstance(videos, list) else (),
        first_batch=_picture(folder, "first_batch.png", problems),
        probes=_object(folder / "probes" / "probes.json", problems),
        occlusion=_picture(folder, "probes/occlusion.png", problems),
        failures=tuple(_failures(folder, problems)),
        problems=tuple(problems),
    )


def config_of(inputs: Inputs, section: str | None = None) -> Json:
    """The config, or a section of it, as plain values; empty where there is none or it is not YAML."""
    values = _parsed(inputs.config_text or "")
    if section is not None:
        values = values.get(section) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def config_value(config: Any, *keys: str) -> Any:
    """The value at a path of a config; None where there is none."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config


@functools.lru_cache(maxsize=8)
def _parsed(text: str) -> Any:
    try:
        return parse_yaml(text, "config.yaml")
    except UserError:
        return None


def _failures(folder: Path, problems: list[str]) -> list[str]:
    """One sentence for each step that stopped, or was left out, on a value that is not finite."""
    found: list[str] = []
    for path in sorted((folder / "failures").glob("step-*/failure.json")):
        about = _object(path, problems) or {}
        what = "Left out was" if about.get("skipped") else "Training stopped before"
        found.append(
            f"{what} step {about.get('step', '?')}: {about.get('term', 'a value')} was "
            f"{about.get('value', 'not finite')}. Batch and weights are in failures/{path.parent.name}."
        )
    return found


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
    found: list[tuple[str, float]] = []
    for name, value in fields.items():
        if name == "step":
            continue
        if isinstance(value, Mapping):
            # {"step": 3, "metrics": {"loss/total": ...}} and the flat form mean the same.
            found += _numbers(value, "" if name in ("metrics", "values") else f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((prefix + name, float(value) if math.isfinite(float(value)) else math.nan))
        elif value is None or value in ("NaN", "Infinity", "-Infinity", "nan", "inf", "-inf"):
            found.append((prefix + name, math.nan))
    return found


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


def _json(path: Path, problems: list[str]) -> Any:
    content = _bytes(path, problems)
    if content is None:
        return None
    try:
        return parse_value(content.decode("utf-8"), path.name)
    except UnicodeDecodeError:
        problems.append(f"{path.name} is not UTF-8 text. Its part of this page is left out")
    except UserError as error:
        problems.append(f"{error} Its part of this page is left out")
    return None


def _object(path: Path, problems: list[str]) -> Json | None:
    value = _json(path, problems)
    if isinstance(value, dict) or value is None:
        return value
    if isinstance(value, list):
        return {"rows": value}
    problems.append(f"{path.name} holds a {type(value).__name__} where an object was expected")
    return None
