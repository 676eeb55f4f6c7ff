"""Videos of rollouts: which of them the page embeds, and how they are labelled."""

from __future__ import annotations

from pathlib import Path

from tutti.report.blocks import Section, Video, Videos, data_address
from tutti.report.inputs import Inputs, VideoEntry, is_inside
from tutti.report.sections.success import CONDITIONS

MISSING = "No videos yet: `tutti evaluate` records some of each task (evaluation.videos_per_task)."


def videos_section(inputs: Inputs, budget: int) -> Section:
    """Each task's videos, as many as fit in `budget` bytes of page, one of each task first."""
    if not inputs.videos:
        return Section(id="videos", title="Rollouts", missing=MISSING)
    tasks: dict[str, list[VideoEntry]] = {}
    for entry in inputs.videos:
        tasks.setdefault(entry.task, []).append(entry)
    longest = max(map(len, tasks.values()))
    turns = [entries[turn] for turn in range(longest) for entries in tasks.values() if turn < len(entries)]
    videos: dict[int, Video] = {}
    for entry in turns:
        source, why = _embed(inputs.folder / "videos", entry.file, budget)
        budget -= len(source)
        videos[id(entry)] = Video(
            success=entry.success, label=_label(entry), instruction=entry.instruction, source=source, why=why
        )
    groups = [
        (task, sorted((videos[id(entry)] for entry in entries), key=lambda video: video.success))
        for task, entries in tasks.items()
    ]
    wins = sum(entry.success for entry in inputs.videos)
    lead = (
        f"{wins} of the evaluation's rollouts that succeed and {len(inputs.videos) - wins} that fail, chosen "
        "to show both: not a sample to read a rate from. A video plays while it is visible."
    )
    return Section(id="videos", title="Rollouts", lead=lead, blocks=[Videos(groups=groups)])


def _label(entry: VideoEntry) -> str:
    parts = [
        f"seed {entry.seed}" if entry.seed is not None else "",
        f"{entry.decisions} control steps" if entry.decisions is not None else "",
        CONDITIONS[entry.condition][0] if entry.condition != "policy" else "",
    ]
    return ", ".join(part for part in parts if part)


def _embed(folder: Path, file: str, budget: int) -> tuple[str, str]:
    """(data address, "") or ("", why not). Only files inside the videos folder are read."""
    path = (folder / Path(file).name) if file else None
    if path is None or not path.is_file():
        return "", f"{file or 'the file'} is missing"
    if not is_inside(path, folder):
        return "", f"videos/{path.name} is a link that leads out of the run's folder"
    if 4 * path.stat().st_size / 3 + 64 > budget:
        return "", f"not embedded, the page would be too large: see videos/{path.name}"
    return data_address("video/mp4", path.read_bytes()), ""
