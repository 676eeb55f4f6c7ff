"""A set like BridgeData: samples per CPU second of tensorflow_datasets' own pipeline, and of Tutti.

    python benchmarks/rlds_loader.py [--tfds /path/to/python/of/tfds]    # 3 minutes of one core

Episodes of 38 steps with two JPEG pictures of 256 px, state, action and text are written as TFDS lays them
out. All ways take turns on one thread; ratios are of the same turn. tensorflow_datasets has an environment of
its own: without it its row is left out. The pictures are compared first, within what two JPEG decoders differ
by.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rlds_sets as sets
import torch
from PIL import Image
from tables import RESULTS, Table, prints_user_errors, publish
from timing import spread

from tutti.data import DataBundle, DataConfig
from tutti.runs.provenance import circumstances, made_with
from tutti.runs.terminal import print_line
from tutti.types import DataNeeds, UserError

EDGE, STEPS, SHARDS = 256, 38, 2
VIEWS = ("image_0", "image_1")
TFDS, BUILDING, WARM = "tensorflow_datasets, in order", "Tutti, building the cache", "Tutti, warm cache"
MOST_OFF = 14
"""Levels by which TensorFlow's JPEG decoder, with its fast DCT, has been seen to differ from others."""


def write(folder: Path, episodes: int) -> Path:
    """Smooth moving pictures with some noise, JPEG of quality 90."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:EDGE, 0:EDGE].astype(np.float32)

    def picture(episode: int, step: int, view: int) -> bytes:
        wave = np.sin(x / 23 + step / 6 + episode) + np.cos(y / 31 - step / 9 + view)
        noise = random.normal(0, 4, (EDGE, EDGE, 1))
        pixels = np.stack([128 + 50 * wave, 110 - 30 * wave, 90 + 20 * wave], -1) + noise
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()

    def episode(number: int) -> bytes:
        values: dict[str, sets.Values] = {**sets.flags_of(STEPS)}
        for view, name in enumerate(VIEWS):
            values[f"steps/observation/{name}"] = [picture(number, step, view) for step in range(STEPS)]
        numbers = {"steps/observation/state": 7, "steps/action": 7}
        values |= {key: random.random((STEPS, dim), np.float32) for key, dim in numbers.items()}
        return sets.example({**values, "steps/language_instruction": [b"put the pot on the stove"] * STEPS})

    jpeg = sets.image(EDGE, EDGE, 3)
    jpeg["image"]["encodingFormat"] = "jpeg"
    steps = {f"observation/{view}": jpeg for view in VIEWS} | {"language_instruction": sets.TEXT}
    steps |= {"observation/state": sets.tensor(7), "action": sets.tensor(7)}
    shards = np.array_split(np.arange(episodes), SHARDS)
    records = {"train": [(episode(number) for number in shard.tolist()) for shard in shards]}
    return sets.write_set(folder / "bridge_orig" / "1.0.0", "bridge_orig", sets.episodes_of(steps), records)


def config(folder: Path, home: Path) -> DataConfig:
    """Tutti's loader on the set, the pictures in their own size."""
    cache = {"kind": "raw", "folder": str(home)}
    source = {"path": str(folder), "views": [f"observation/{view}" for view in VIEWS]}
    values = {"batch_size": 64, "image_size": EDGE, "prefetch": 0, "validation_fraction": 0, "cache": cache}
    return DataConfig.model_validate({"sources": [source], **values})


def built(folder: Path, home: Path) -> DataBundle:
    """From the opening on."""
    return config(folder, home).build(DataNeeds())


def asked(python: Path, *arguments: object) -> str:
    """What the pipeline's process prints. Raises: UserError with what it said if it fails."""
    script = Path(__file__).with_name("rlds_loader_tfds.py")
    variables = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(python), str(script), *map(str, arguments)],
        env={**os.environ, **variables, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(f"tensorflow_datasets has failed:\n{done.stderr[-1000:]}")
    return done.stdout


def difference(folder: Path, home: Path, python: Path) -> int:
    """The largest difference of the first pictures, in levels."""
    asked(python, folder, 2 * STEPS, home / "theirs.npy")
    theirs = np.load(home / "theirs.npy").transpose(0, 1, 4, 2, 3).astype(int)
    windows = built(folder, home / "warm").windows
    own = windows.gather(np.arange(2 * STEPS)).observation.images.numpy()
    return int(np.abs(own - theirs).max())


def measure(folder: Path, home: Path, given: argparse.Namespace) -> dict[str, list[float]]:
    """Samples per CPU second of each, a value a turn."""
    warm = iter(built(folder, home / "warm").train)

    def building(turn: int) -> float:
        began = time.process_time()
        count = len(built(folder, home / str(turn)).windows)
        spent = time.process_time() - began
        shutil.rmtree(home / str(turn))
        return count / spent

    def loading(turn: int) -> float:
        began, count = time.process_time(), 0
        while (spent := time.process_time() - began) < given.seconds:
            count += len(next(warm).window)
        return count / spent

    def theirs(turn: int) -> float:
        found = json.loads(asked(given.tfds, folder, given.seconds).splitlines()[-1])
        return found["samples"] / found["seconds"]

    ways: dict[str, Callable[[int], float]] = {TFDS: theirs} if given.tfds else {}
    ways |= {BUILDING: building, WARM: loading}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(given.turns):
        for name, way in ways.items():
            rates[name].append(way(turn))
    return rates


@prints_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """0, 1 if pictures differ by more than decoders do, 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tfds", type=Path, help="Python of an environment with tensorflow_datasets")
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="CPU time of a way in a turn")
    parser.add_argument("--output", type=Path, default=RESULTS / "rlds_loader", help="without suffix")
    given, made = parser.parse_args(arguments), circumstances()
    torch.set_num_threads(1)
    if given.tfds:  # where it lies on this machine is nobody's business
        made["command"] = made["command"].replace(str(given.tfds), "/path/to/python/of/tfds")
    with tempfile.TemporaryDirectory(prefix="tutti-rlds-loader-") as name:
        home = Path(name)
        print_line(f"writing {given.episodes} episodes ...")
        folder = write(home / "set", given.episodes)
        off = difference(folder, home, given.tfds) if given.tfds else None
        rates = measure(folder, home, given)
    rows: list[tuple[str, ...]] = []
    for name, many in rates.items():
        cells = [name, f"{spread(many).median:,.0f}"]
        if TFDS in rates:
            ratio = spread([one / by for one, by in zip(many, rates[TFDS], strict=True)])
            cells.append(f"{ratio.median:.3g} ({ratio.low:.3g} to {ratio.high:.3g})")
        rows.append(tuple(cells))
    heads = ("way", "samples per CPU s", "/ tensorflow_datasets")[: len(rows[0])]
    compared = "" if off is None else f"Pictures differ by at most {off} levels (two JPEG decoders). "
    note = (
        f"{given.episodes} episodes of {STEPS} steps, two JPEG pictures of {EDGE} px; {given.turns} turns. "
        f"{compared}{made_with(made)}"
    )
    result: dict[str, Any] = {"made": made, "rates": rates, "difference": off}
    table = Table(title="RLDS like BridgeData", heads=heads, rows=tuple(rows))
    publish(given.output, "benchmarks/rlds_loader", [table], [note], result)
    return int(off is not None and off > MOST_OFF)


if __name__ == "__main__":
    sys.exit(main())
