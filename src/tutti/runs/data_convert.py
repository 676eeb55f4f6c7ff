"""Converts a data set of any format to LeRobot v3.0: in parallel, resumable, checked before it is there."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from tutti.data.content import digest, spans
from tutti.data.episodes import PAIRS, WHERE_PRESENT, Episode, EpisodeStore
from tutti.data.formats.chosen import Chosen
from tutti.data.formats.lerobot import VIEW
from tutti.data.formats.lerobot.pieces import ROWS, EpisodeRecord, Storage, save_piece
from tutti.data.formats.lerobot.reader import LeRobotStore
from tutti.data.formats.lerobot.writer import DatasetWriter
from tutti.data.sources import LabelsConfig, SourceConfig
from tutti.distributed.cores import usable_cores
from tutti.errors import UserError
from tutti.runs.terminal import print_line, progress_bar
from tutti.storage.files import (
    begin_folder,
    commit_folder,
    exclusive_lock,
    explain_full_disk,
    megabytes,
    partial_path,
    write_json,
)
from tutti.storage.reading import read_json
from tutti.suites.workers import run_jobs
from tutti.types import Dimensions

PLAN = "conversion.json"
"""What was converted and how; kept in the data set, where it tells that it is whole."""
_IN_FRONT = r"^(steps\.)?(observations?|obs)\.(images\.)?"
"""What other formats put before the name of a camera."""
_EPISODES, _LEVEL, _SHARE = 24, 8.0, 0.75
"""Episodes of which frames are compared at the end; by how many of 255 levels a frame of a video may differ
from its source on average, or by which share of the source's standard deviation, whichever is more."""
_BLOCKS = 4
"""Parts of the episodes that each process opens one after the other: all end at about the same time."""
_NEARER = 0.5
"""By how many levels the frame before or after may be nearer: if the robot stands still they are alike."""


@dataclass(frozen=True, slots=True)
class _Job:
    """An episode of what `source`, the JSON of a config, opens: by its number in the data set."""

    source: str
    episode: int
    folder: Path
    storage: Storage


class StoredPictures:
    """The pictures of an episode, decoded when they are asked for."""

    def __init__(self, store: EpisodeStore, view: str, episode: Episode) -> None:
        height, width = store.spec.image_shapes[store.spec.views.index(view)]
        self.shape = (episode.length, height, width, 3)
        self._of = store, view, episode

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, frames: slice, /) -> UInt8[np.ndarray, "k h w 3"]:
        store, view, episode = self._of
        return store.frames(view, np.arange(episode.start, episode.end)[frames])


def convert(
    source: SourceConfig,
    target: Path,
    *,
    storage: Storage = "video",
    shard: tuple[int, int] = (1, 1),
    workers: int | None = None,
) -> bool:
    """Converts what a source names to a LeRobotDataset v3.0 at `target`; gives whether that is there now.

    Each episode is first written into a piece of its own in a hidden folder beside `target`, by `workers`
    processes, one a core if it is None (0: in this process). Of several `shard`s (i, n) on machines that
    share the folder each takes every n-th episode, and the one that finds all pieces there joins them. Killed
    at any moment, the same call goes on, and ends in the same files. Numbers, texts and some pictures are
    compared with the source before `target` gets its name.

    Raises: UserError for a source that cannot be read or stored, or a `target` that is something else.
    """
    store = source.open()
    if store.is_pairs:
        cure = "cure: name it in data.sources as it is; a LeRobotDataset stores episodes of a robot."
        raise UserError(f"{store.name}: {PAIRS}.\n  {cure}")
    names = view_names(store.spec.views)
    plan, work = _plan(store, names, storage), partial_path(target)
    if target.exists():
        _require_same(target / PLAN, plan, f"{target} exists already and is not overwritten.")
        shutil.rmtree(work, ignore_errors=True)
        print_line(f"{target} is there already, converted from the same data")
        return True
    folders = [work / f"pieces/{i // 1000:03d}/{i:06d}" for i in range(len(store.episodes))]
    work.mkdir(parents=True, exist_ok=True)
    if (work / PLAN).exists():
        _require_same(work / PLAN, plan, f"{target}: a conversion of other data, or another one, was begun.")
    write_json(work / PLAN, plan)
    for remark in store.remarks:
        print_line(remark)

    def needed() -> str:
        done = [folder for folder in folders if (folder / ROWS).exists()]
        used = sum(file.stat().st_size for folder in done for file in folder.iterdir())
        each = used / max(1, len(done))
        return f"about {megabytes(each * (2 * len(folders) - len(done)))} more; {len(done)} episodes are kept"

    with explain_full_disk(target, "the converted data set", needed):
        number, count = shard
        text = source.model_dump_json()
        every = [
            _Job(text, episode.index, folder, storage)
            for episode, folder in zip(store.episodes, folders, strict=True)
        ]
        own = every[number - 1 :: count]
        with _alone(work / f"shard-{number}-of-{count}", f"{target}: another process converts this shard."):
            _write_pieces(source, store, own, workers)
        missing = sum(not (folder / ROWS).exists() for folder in folders)
        if target.exists():  # another shard joined the pieces meanwhile, and deleted them
            return True
        if missing:
            print_line(
                f"shard {number} of {count} is finished: {len(own)} episodes; {missing} of {len(folders)} "
                "are to be written by other shards, the last of which joins all"
            )
            return False
        with exclusive_lock(
            work, waiting=lambda: print_line("waiting for the process that joins the pieces")
        ):
            if not target.exists():
                _join(store, names, folders, work, target, storage=storage, plan=plan)
    shutil.rmtree(work, ignore_errors=True)
    return True


def lenient(source: SourceConfig) -> SourceConfig:
    """The source with labels that may be missing: what is not there stays away."""
    return source.model_copy(update={"labels": LabelsConfig.model_validate(WHERE_PRESENT)})


@contextmanager
def _alone(folder: Path, busy: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    with exclusive_lock(folder, busy):
        yield


def view_names(views: Sequence[str]) -> dict[str, str]:
    """What LeRobot calls each view: its own name where that is one for LeRobot. Raises: UserError for two
    that would be called the same."""
    names = {view: view if view.startswith("observation.image") else "" for view in views}
    for view in (view for view, name in names.items() if not name or "/" in name):
        names[view] = VIEW + re.sub(_IN_FRONT, "", view.replace("/", "."))
    if len(set(names.values())) < len(names):
        raise UserError(f"views: two would be called the same: {names}.\n  cure: choose one (views=[...]).")
    return names


def _plan(store: EpisodeStore, names: Mapping[str, str], storage: Storage) -> dict[str, Any]:
    spec, texts = store.spec, [store.instructions[i].encode() for i in np.unique(store.instruction_of)]
    told = repr((spec, [(one.index, one.length) for one in store.episodes])).encode()
    numbers = [one.tobytes() for one in store.number_digests.values()]
    return {
        "format": 1,
        "pictures": storage,
        "views": dict(names),
        "flip": store.roles.flip,
        "episodes": len(store.episodes),
        "frames": spec.num_frames,
        "content": f"{digest(told, *numbers, store.instruction_of.tobytes(), *texts):016x}",
    }


def _require_same(path: Path, plan: dict[str, Any], problem: str) -> None:
    found = read_json(path) if path.is_file() else {}
    if found != plan:
        differ = ", ".join(key for key, value in plan.items() if found.get(key) != value) if found else ""
        raise UserError(
            f"{problem}\n"
            f"  found:    {path if found else 'another folder'}{f', other {differ}' * bool(differ)}\n"
            f"  cure:     choose another folder, or delete {path.parent} first."
        )


def _write_pieces(
    source: SourceConfig, store: EpisodeStore, jobs: Sequence[_Job], workers: int | None
) -> None:
    """Those that are not there yet. `store` is what `source`, that of the jobs, opens."""
    todo = [job for job in jobs if not (job.folder / ROWS).exists()]
    count = min(usable_cores() if workers is None else workers, len(todo))
    blocks = iter([todo])
    if count <= 1:
        count, _opened[:] = 0, [(source.model_dump_json(), store)]
    else:
        blocks = _blocks(source, todo, -(-len(todo) // (_BLOCKS * count)))
    own: dict[int, Iterator[_Job]] = {}

    def next_job(worker: int) -> _Job | None:
        for job in own.get(worker, ()):
            return job
        own[worker] = iter(next(blocks, ()))
        return next(own[worker], None)

    try:
        with progress_bar("converting episodes") as bar:
            done = len(jobs) - len(todo)
            bar(done, len(jobs), "")
            for _ in run_jobs(_write_piece, count, next_job):
                bar(done := done + 1, len(jobs), "")
    finally:
        _opened.clear()


def _blocks(source: SourceConfig, jobs: Sequence[_Job], size: int) -> Iterator[list[_Job]]:
    """The jobs in blocks, the source of each of which names no other episode: where numbers lie beside
    pictures, opening all of a data set in every process would read it as often as there are processes."""
    for begin in range(0, len(jobs), size):
        block = jobs[begin : begin + size]
        numbers = tuple(f"{first}-{last}" for first, last in spans([job.episode for job in block]))
        text = source.model_copy(update={"episodes": numbers}).model_dump_json()
        yield [replace(job, source=text) for job in block]


_opened: list[tuple[str, EpisodeStore]] = []
"""The config and the store of the last data set that this process has opened, if any."""


def _write_piece(job: _Job) -> None:
    if not _opened or _opened[0][0] != job.source:
        _opened.clear()  # before the next one is there, which takes as much memory
        _opened.append((job.source, SourceConfig.model_validate_json(job.source).open()))
    store = _opened[0][1]
    episode = next(one for one in store.episodes if one.index == job.episode)
    names = view_names(store.spec.views)
    rows = slice(episode.start, episode.end)
    record = EpisodeRecord(
        images={name: StoredPictures(store, view, episode) for view, name in names.items()},
        states=store.states[rows],
        actions=store.actions[rows],
        instruction=tuple(store.instructions[i] for i in store.instruction_of[rows].tolist()),
    )
    # Of a killed run a worker may still write this episode: both have a folder of their own.
    unique = job.folder.with_name(f"{job.folder.name}-{os.getpid()}")
    with ThreadPoolExecutor(1) as pool:
        what = f"{store.name}: episode {episode.index}"
        save_piece(unique, record, what, pool, fps=store.spec.fps, storage=job.storage)
    try:
        os.replace(unique, job.folder)
    except OSError:  # it is there
        shutil.rmtree(unique)


def _join(
    store: EpisodeStore,
    names: Mapping[str, str],
    folders: Sequence[Path],
    work: Path,
    target: Path,
    *,
    storage: Storage,
    plan: dict[str, Any],
) -> None:
    joined = begin_folder(work / "joined")
    spec = store.spec
    writer = DatasetWriter(
        joined,
        fps=spec.fps,
        views=tuple(names.values()),
        robot_type=spec.embodiment,
        storage=storage,
        dimensions=Dimensions(**spec.dimensions()),
    )
    with closing(writer), progress_bar("joining episodes") as bar:
        for done, folder in enumerate(folders, 1):
            writer.join(folder)
            bar(done, len(folders), "")
        writer.finish()
    worst = compare(store, joined, names, exact=storage == "image")
    write_json(joined / PLAN, plan)
    commit_folder(joined, target)
    print_line(
        f"{target}: {len(store.episodes):,} episodes, {spec.num_frames:,} frames, state {spec.state_dim}, "
        f"action {spec.action_dim}, views {', '.join(names.values())}"
    )
    said = ", ".join(f"{name.removeprefix(VIEW)} {levels:.1f}" for name, levels in worst.items())
    print_line(
        "compared with the source: every number and text is equal; pictures of "
        f"{min(_EPISODES, len(store.episodes))} episodes differ by at most {said} of 255 levels on average"
    )


def compare(store: EpisodeStore, folder: Path, names: Mapping[str, str], *, exact: bool) -> dict[str, float]:
    """Compares a converted data set with its source: the lengths, numbers and texts of all episodes, and
    frames of some, spread evenly; gives for each view the largest mean difference of a frame, in levels.

    Raises: UserError naming the episode that differs.
    """
    new = LeRobotStore(folder, tuple(names.values()), chosen=(Chosen(labels=WHERE_PRESENT),))

    def differs(episode: Episode, what: str) -> UserError:
        return UserError(
            f"{folder}: {what} of episode {episode.index} of {store.name} differ after the conversion.\n"
            "  cure: run the command again with another target; if it happens again, report it."
        )

    if [e.length for e in store.episodes] != [e.length for e in new.episodes]:
        raise differs(store.episodes[0], "number or lengths")
    for before, after in zip(store.episodes, new.episodes, strict=True):
        old_rows, new_rows = slice(before.start, before.end), slice(after.start, after.end)
        for what in ("states", "actions"):
            if not np.array_equal(
                getattr(store, what)[old_rows], getattr(new, what)[new_rows], equal_nan=True
            ):
                raise differs(before, what)
        said = [store.instructions[i] for i in store.instruction_of[old_rows]]
        if said != [new.instructions[i] for i in new.instruction_of[new_rows]]:
            raise differs(before, "instructions")
    worst = dict.fromkeys(names.values(), 0.0)
    some = np.unique(np.linspace(0, len(store.episodes) - 1, _EPISODES).round().astype(int)).tolist()
    for place in some:
        before, after = store.episodes[place], new.episodes[place]
        for view, name in names.items():
            for frame in {0, before.length // 2, before.length - 1}:
                near = np.unique(np.clip([frame - 1, frame, frame + 1], 0, before.length - 1))
                sources = store.frames(view, before.start + near).astype(np.int16)
                seen = new.frames(name, np.array([after.start + frame]))[0]
                errors = np.abs(sources - seen).mean(axis=(1, 2, 3))
                own = near.tolist().index(frame)
                allowed = 0.0 if exact else max(_LEVEL, _SHARE * float(sources[own].std()))
                if errors[own] > min(allowed, errors.min() + _NEARER):
                    raise differs(before, f"pictures of {view} (frame {frame})")
                worst[name] = max(worst[name], float(errors[own]))
    return worst
