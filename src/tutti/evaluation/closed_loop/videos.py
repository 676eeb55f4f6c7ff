"""Videos of rollouts: the executed actions are replayed in the simulator, rendered larger, and encoded."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from jaxtyping import UInt8

from tutti.distributed.cores import usable_cores
from tutti.evaluation.closed_loop.rollouts import Rollout
from tutti.storage.files import write_atomically
from tutti.suites.environment import Suite
from tutti.suites.workers import Workers

IMAGE_SIZE = 240  # even, as yuv420p needs
MAX_WORKERS = 8
MAX_FRAMES = 50
QUALITY = 30  # x264's constant rate factor


def choose(rollouts: Sequence[Rollout], per_task: int = 2) -> list[Rollout]:
    """Of each task the policy's success and failure with the lowest seeds; with `per_task` 1 only the first
    of these that exists. The same records give the same choice.
    """
    chosen: list[Rollout] = []
    for task in dict.fromkeys(r.task for r in rollouts):
        played = sorted(
            (r for r in rollouts if r.task == task and r.condition == "policy" and r.decisions > 0),
            key=lambda r: r.seed,
        )
        firsts = [next((r for r in played if r.success is outcome), None) for outcome in (True, False)]
        chosen += [r for r in firsts if r is not None][:per_task]
    return chosen


def rollout_videos(
    rollouts: Sequence[Rollout],
    suite: Suite,
    folder: Path,
    *,
    per_task: int = 2,
    image_size: int = IMAGE_SIZE,
    workers: int | Literal["auto"] = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """An MP4 (H.264, plays while loading) of each chosen rollout, the views side by side, in real time.

    Writes `<task>-success|failure-<seed>-<identity>.mp4` and index.json = {"videos": [{file, task, seed,
    instruction, success, decisions, condition}]}. A video that is there already is kept. `workers`
    processes are spawned (auto: one per core, at most 8); one works in this process.

    Raises UserError: no OpenGL context can be opened, or the disk is full.
    """
    jobs = [
        Job(rollout=r, suite=suite, path=folder / file_name(r), size=image_size)
        for r in choose(rollouts, per_task)
    ]
    left = [job for job in jobs if not job.path.is_file()]
    left.sort(key=lambda job: -job.rollout.decisions)  # the longest first, so that no worker ends late
    done = len(jobs) - len(left)
    if progress is not None:
        progress(done, len(jobs))
    wanted = min(usable_cores(), MAX_WORKERS) if workers == "auto" else workers
    for _ in _make(left, min(wanted, len(left))):
        done += 1
        if progress is not None:
            progress(done, len(jobs))
    index: list[dict[str, Any]] = [
        {
            "file": job.path.name,
            "task": job.rollout.task,
            "seed": job.rollout.seed,
            "instruction": job.rollout.instruction,
            "success": job.rollout.success,
            "decisions": job.rollout.decisions,
            "condition": job.rollout.condition,
        }
        for job in jobs
    ]
    write_atomically(folder / "index.json", json.dumps({"videos": index}, indent=1))
    return [job.path for job in jobs]


def _make(left: list[Job], count: int) -> Iterator[None]:
    """Makes the videos, in this process or in several spawned ones; yields as each is done."""
    if count <= 1:
        for job in left:
            make_video(job)
            yield
        return
    with Workers(make_video, count) as pool:
        for _ in pool.run(lambda _: left.pop(0) if left else None):
            yield


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One video to make."""

    rollout: Rollout
    suite: Suite
    path: Path
    size: int


def file_name(rollout: Rollout) -> str:
    """Names the task, the outcome, the seed and, by its hash, the rollout itself."""
    outcome = "success" if rollout.success else "failure"
    return f"{rollout.task}-{outcome}-{rollout.seed}-{rollout.identity[:8]}.mp4"


def make_video(job: Job) -> None:
    """Replays and encodes one rollout and puts the file in its place."""
    frames, stride = replay(job)
    write_atomically(job.path, encode(frames, round(job.suite.fps / stride)))


def replay(job: Job) -> tuple[UInt8[np.ndarray, "t v h w 3"], int]:
    """The images of the first start, of every `stride`-th decision after it, and of the last; and the
    stride.

    A larger image with smooth edges takes 20 ms, so a long rollout is shown at half the rate.
    """
    suite, actions = job.suite, job.rollout.actions
    stride = math.ceil(len(actions) / MAX_FRAMES)
    with closing(suite.make(job.rollout.task, job.size, samples=4)) as simulation:
        simulation.reset(job.rollout.seed)
        frames = [simulation.render()]
        for number, action in enumerate(actions, start=1):
            simulation.step(action)
            if number % stride == 0 or number == len(actions):
                frames.append(simulation.render())
    return np.stack(frames), stride


def encode(frames: UInt8[np.ndarray, "t v h w 3"], fps: int) -> bytes:
    """H.264 in yuv420p as MP4 with its index in front; views side by side, the last frame held for half a
    second.
    """
    count, views, height, width, _ = frames.shape
    wide = frames.transpose(0, 2, 1, 3, 4).reshape(count, height, views * width, 3)
    with tempfile.TemporaryDirectory() as scratch:  # moving the index to the front needs a real file
        path = Path(scratch) / "video.mp4"
        with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
            # Without mbtree=0, x264 gives other bytes for the same frames now and then.
            options = {"crf": str(QUALITY), "preset": "veryfast", "x264-params": "mbtree=0"}
            stream = container.add_stream("libx264", rate=fps, options=options)
            stream.width, stream.height, stream.pix_fmt = views * width, height, "yuv420p"
            stream.codec_context.thread_count = 1  # the same bytes on any number of cores
            for image in (*wide, *[wide[-1]] * (fps // 2)):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path.read_bytes()
