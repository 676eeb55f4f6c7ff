"""The section of rollouts: which videos are put into the page, and how they are labelled."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from tutti.report.blocks import Section, Video, Videos
from tutti.report.inputs import Inputs, Json, is_inside
from tutti.report.sections.success import CONDITIONS

MISSING = "No videos yet: `tutti evaluate` records some of each task (evaluation.videos_per_task)."


def videos_section(inputs: Inputs, budget: int) -> Section:
    """Each task's videos, as many as fit in `budget` bytes of page, one of each task first."""
    if not inputs.videos:
        return Section(id="videos", title="Rollouts", missing=MISSING)
    ordered = sorted(range(len(inputs.videos)), key=lambda i: _turn(inputs.videos, i))
    sources: dict[int, tuple[str, str]] = {}
    for index in ordered:
        source, why = _embed(inputs.folder / "videos", str(inputs.videos[index].get("file", "")), budget)
        budget -= len(source)
        sources[index] = (source, why)
    groups: dict[str, list[Video]] = {}
    for index, entry in enumerate(inputs.videos):
        source, why = sources[index]
        video = Video(
            success=bool(entry.get("success")),
            label=_label(entry),
            instruction=str(entry.get("instruction") or ""),
            source=source,
            why=why,
        )
        groups.setdefault(str(entry.get("task", "no task named")), []).append(video)
    shown = [(task, sorted(videos, key=lambda v: v.success)) for task, videos in groups.items()]
    wins = sum(v.success for _, videos in shown for v in videos)
    losses = len(inputs.videos) - wins
    lead = (
        f"{wins} of the evaluation's rollouts that succeed and {losses} that fail, chosen to show both: not "
        "a sample to read a rate from. A video plays while it is in sight."
    )
    return Section(id="videos", title="Rollouts", lead=lead, blocks=[Videos(groups=shown)])


def _turn(videos: Sequence[Json], index: int) -> tuple[int, int]:
    """How many videos of the same task come before it: every task's first is embedded before any second."""
    task = videos[index].get("task")
    return sum(video.get("task") == task for video in videos[:index]), index


def _label(entry: Json) -> str:
    parts = [f"seed {entry['seed']}"] if "seed" in entry else []
    if isinstance(entry.get("decisions"), int):
        parts.append(f"{entry['decisions']} decisions")
    if entry.get("condition") not in (None, "policy"):
        parts.append(CONDITIONS.get(str(entry["condition"]), (str(entry["condition"]), ""))[0])
    return ", ".join(parts)


def _embed(folder: Path, file: str, budget: int) -> tuple[str, str]:
    """(data address, "") or ("", why not). Only files inside the videos folder are read."""
    path = (folder / Path(file).name) if file else None
    if path is None or not path.is_file():
        return "", f"{file or 'the file'} is missing"
    if not is_inside(path, folder):
        return "", f"videos/{path.name} is a link that leads out of the run's folder"
    size = path.stat().st_size
    if 4 * size / 3 + 64 > budget:
        return "", f"not embedded, the page would be too large: see videos/{path.name}"
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode("ascii"), ""
