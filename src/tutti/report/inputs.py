"""What a run has left in its folder, read so that a missing, torn or foreign file never stops the report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

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
    config = _bytes(folder / "config.yaml", problems)
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
        first_batch=_bytes(folder / "first_batch.png", problems),
        probes=_object(folder / "probes" / "probes.json", problems),
        occlusion=_bytes(folder / "probes" / "occlusion.png", problems),
        failures=tuple(_failures(folder, problems)),
        problems=tuple(problems),
    )


def config_of(inputs: Inputs, section: str | None = None) -> Json:
    """The config, or a section of it, as plain values; empty where there is none or it is not YAML."""
    try:
        values = yaml.safe_load(inputs.config_text or "")
    except yaml.YAMLError:
        return {}
    if section is not None:
        values = values.get(section) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


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
    content = _bytes(path, problems) or b""
    for line in content.decode("utf-8", errors="replace").splitlines():
        try:
            fields = json.loads(line)
            step = int(fields["step"])
        except (ValueError, KeyError, TypeError):
            broken += bool(line.strip())
            continue
        if step < before:
            restarts.append(step)
        before = step
        for name, value in _numbers(fields):
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
            found.append((prefix + name, float(value) if math.isfinite(value) else math.nan))
        elif value is None or value in ("NaN", "Infinity", "-Infinity", "nan", "inf", "-inf"):
            found.append((prefix + name, math.nan))
    return found


def _bytes(path: Path, problems: list[str]) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{path.name} could not be read: {error.strerror or error}")
        return None


def _json(path: Path, problems: list[str]) -> Any:
    content = _bytes(path, problems)
    if content is None:
        return None
    try:
        return json.loads(content)
    except ValueError as error:
        problems.append(f"{path.name} is not valid JSON ({error}); its part of this page is left out")
        return None


def _object(path: Path, problems: list[str]) -> Json | None:
    value = _json(path, problems)
    if isinstance(value, dict) or value is None:
        return value
    if isinstance(value, list):
        return {"rows": value}
    problems.append(f"{path.name} holds a {type(value).__name__} where an object was expected")
    return None
