"""Videos of rollouts: the executed actions are replayed in the simulator, rendered larger, and encoded.

An evaluation writes MP4s of the bare views; `tutti play` writes them below the sentence, as GIF or MP4.
"""

from __future__ import annotations

import io
import json
import math
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from contextlib import closing
from fractions import Fraction
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from tutti.evaluation.closed_loop.rollouts import Rollout, in_parallel
from tutti.storage.files import write_atomically
from tutti.storage.reading import read_json
from tutti.suites.environment import Suite

INDEX = "index.json"
IMAGE_SIZE = 240  # even, as yuv420p needs
MAX_FRAMES = 50
QUALITY = 30  # x264's constant rate factor
BAND, LETTERS, SMALLEST, GAP = 40, 17, 11, 4
"""Pixels: the band above the pictures, its letters, which shrink for a long sentence, the gap of views."""
INK, PAPER = (255, 255, 255), (32, 34, 40)
OUTCOMES = {True: ("success", (120, 220, 130)), False: ("no success", (255, 170, 110))}
COLOURS, HELD = 128, (0.8, 1.5)
"""Colours of a GIF, and the seconds that its first and its last picture are held."""
PLAIN = Image.Dither.NONE  # dithering would change every pixel of every picture, which a GIF must then store


def choose(rollouts: Sequence[Rollout], per_task: int = 2) -> list[Rollout]:
    """Of each task the policy's successes and failures with the lowest seeds, in turn, of each at most half
    of `per_task`, rounded up; 1 is the first of these that exists. The same records give the same choice.
    """
    chosen: list[Rollout] = []
    for task in dict.fromkeys(r.task for r in rollouts):
        played = sorted(
            (r for r in rollouts if r.task == task and r.condition == "policy" and r.decisions > 0),
            key=lambda r: r.seed,
        )
        halves = ([r for r in played if r.success is outcome] for outcome in (True, False))
        turns = zip_longest(*(half[: -(-per_task // 2)] for half in halves))
        chosen += [r for turn in turns for r in turn if r is not None][:per_task]
    return chosen


def rollout_videos(
    rollouts: Sequence[Rollout],
    suite: Suite,
    folder: Path,
    *,
    per_task: int = 2,
    image_size: int = IMAGE_SIZE,
    workers: int | Literal["auto"] = "auto",
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Path]:
    """An MP4 (H.264, plays while loading) of each chosen rollout, the views side by side, in real time.

    Writes `<task>-success|failure-<seed>-<identity>.mp4` and index.json = {"videos": [{file, task, seed,
    instruction, success, decisions, condition}]}. A video that is there already is kept. `workers`
    processes are spawned (auto: one per core, at most 8); one works in this process.

    Raises UserError: no OpenGL context can be opened, or the disk is full.
    """
    chosen = choose(rollouts, per_task)
    left = [rollout for rollout in chosen if not (folder / file_name(rollout)).is_file()]
    left.sort(key=lambda rollout: -rollout.decisions)  # the longest first, so that no worker ends late
    done = len(chosen) - len(left)
    progress(done, len(chosen))
    for _ in in_parallel(partial(make_video, suite, folder, image_size), left, workers):
        done += 1
        progress(done, len(chosen))
    about = ("task", "seed", "instruction", "success", "decisions", "condition")
    index = [{"file": file_name(r)} | {name: getattr(r, name) for name in about} for r in chosen]
    write_atomically(folder / INDEX, json.dumps({"videos": index}, indent=1))
    return [folder / file_name(rollout) for rollout in chosen]


def videos_of(folder: Path) -> list[Path]:
    """The videos that index.json names, of an evaluation in its present form; those of before lie beside."""
    path = folder / INDEX
    index = read_json(path)["videos"] if path.is_file() else ()
    return [video for one in index if (video := folder / Path(one["file"]).name).is_file()]


def file_name(rollout: Rollout) -> str:
    """Names the task, the outcome, the seed and, by its hash, the rollout itself."""
    outcome = "success" if rollout.success else "failure"
    return f"{rollout.task}-{outcome}-{rollout.seed}-{rollout.identity[:8]}.mp4"


def make_video(suite: Suite, folder: Path, image_size: int, rollout: Rollout) -> None:
    """Replays and encodes one rollout and puts the file in its place."""
    frames, stride = replay(suite, image_size, rollout)
    write_atomically(folder / file_name(rollout), encode(side_by_side(frames), suite.fps / stride))


def replay(suite: Suite, image_size: int, rollout: Rollout) -> tuple[UInt8[np.ndarray, "t v h w 3"], int]:
    """The images of the first start, of every `stride`-th decision after it, and of the last; and the
    stride.

    A larger image with smooth edges takes 20 ms, so a long rollout is shown at half the rate.
    """
    actions = rollout.actions
    stride = max(1, math.ceil(len(actions) / MAX_FRAMES))
    with closing(suite.make(rollout.task, image_size, samples=4)) as simulation:
        simulation.reset(rollout.seed)
        frames = [simulation.render()]
        for number, action in enumerate(actions, start=1):
            simulation.step(action)
            if number % stride == 0 or number == len(actions):
                frames.append(simulation.render())
    return np.stack(frames), stride


def side_by_side(frames: UInt8[np.ndarray, "t v h w 3"]) -> UInt8[np.ndarray, "t h wide 3"]:
    """The views of each moment in one picture."""
    count, views, height, width, _ = frames.shape
    return frames.transpose(0, 2, 1, 3, 4).reshape(count, height, views * width, 3)


def told(
    frames: UInt8[np.ndarray, "t v h w 3"], instruction: str, success: bool
) -> UInt8[np.ndarray, "t tall wide 3"]:
    """The views side by side below a band with the instruction; on the last picture whether it succeeded."""
    _, views, height, width, _ = frames.shape
    wide, middle = views * (width + GAP) - GAP, BAND // 2
    outcome, colour = OUTCOMES[success]
    right = wide - 10 - _font(LETTERS).getlength(outcome)
    words, room, size = f"\u201c{instruction}\u201d", right - 20, LETTERS
    while size > SMALLEST and _font(size).getlength(words) > room:
        size -= 1
    letters = max(8, int(len(words) * room / max(1, _font(size).getlength(words))))
    text = "\n".join(textwrap.wrap(words, letters, max_lines=2, placeholder=" \u2026\u201d"))
    sheet = Image.new("RGB", (wide, height + BAND), PAPER)
    ImageDraw.Draw(sheet).multiline_text((10, middle), text, INK, _font(size), anchor="lm", spacing=2)
    sheets = np.stack([np.asarray(sheet)] * len(frames))
    for view in range(views):
        sheets[:, BAND:, view * (width + GAP) :][:, :, :width] = frames[:, view]
    last = Image.fromarray(sheets[-1])
    ImageDraw.Draw(last).text((right, middle), outcome, colour, _font(LETTERS), anchor="lm")
    sheets[-1] = np.asarray(last)
    return sheets


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def encode_gif(pictures: UInt8[np.ndarray, "t h w 3"], fps: float) -> bytes:
    """A looped GIF of one palette, its first and last picture held. The same pictures give the same bytes."""
    some = pictures[:: max(1, len(pictures) // 8)]
    palette = Image.fromarray(np.concatenate([*some, pictures[-1]])).quantize(COLOURS, dither=PLAIN)
    frames = [Image.fromarray(one).quantize(palette=palette, dither=PLAIN) for one in pictures]
    lasts = [round(100 / fps) * 10] * len(frames)  # a GIF counts in 10 ms
    lasts[0], lasts[-1] = (round(1000 * seconds) for seconds in HELD)
    file = io.BytesIO()  # optimised: only pixels that change are stored
    frames[0].save(
        file, "GIF", save_all=True, append_images=frames[1:], duration=lasts, loop=0, optimize=True
    )
    return file.getvalue()


def encode(pictures: UInt8[np.ndarray, "t h w 3"], fps: float) -> bytes:
    """H.264 in yuv420p as MP4 with its index in front; the last picture held for half a second."""
    rate = Fraction(fps).limit_denominator(1000) or Fraction(1, 1000)
    height, width = pictures.shape[1:3]
    with tempfile.TemporaryDirectory() as scratch:  # moving the index to the front needs a real file
        path = Path(scratch) / "video.mp4"
        with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
            # Without mbtree=0, x264 gives other bytes for the same frames now and then.
            options = {"crf": str(QUALITY), "preset": "veryfast", "x264-params": "mbtree=0"}
            stream = container.add_stream("libx264", rate=rate, options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.thread_count = 1  # the same bytes on any number of cores
            for image in (*pictures, *[pictures[-1]] * int(fps / 2)):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path.read_bytes()
