"""Kinds of the frame cache: samples per CPU second for building and for gathering batches, against raw.

python benchmarks/cache_kinds.py    # a minute of one core; the set is written first

The kinds take turns in one run on one set, a LeRobotDataset of PNG pictures. CPU time of the process is
counted: the load of the machine shows in it little. Batches are random rows, and nothing is kept in memory.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tables import RESULTS, Table, prints_user_errors, publish
from timing import spread

from tutti.data.cache import CacheConfig, open_frames
from tutti.data.formats.lerobot.pieces import EpisodeRecord
from tutti.data.formats.lerobot.writer import write_lerobot
from tutti.data.sources import SourceConfig
from tutti.runs.provenance import circumstances, made_with

KINDS = ("raw", "jpeg", "none")


def write(folder: Path, episodes: int, length: int, edge: int) -> Path:
    """Smooth moving pictures of one view."""
    y, x = np.mgrid[0:edge, 0:edge].astype(np.float32)
    records: list[EpisodeRecord] = []
    for episode in range(episodes):
        waves = (np.sin(x / 19 + t / 5 + episode) + np.cos(y / 17 - t / 7) for t in range(length))
        pictures = np.stack([np.stack([128 + 60 * w, 100 - 40 * w, 90 + 20 * w], -1) for w in waves])
        numbers = np.random.default_rng(episode).normal(size=(length, 4)).astype(np.float32)
        images = {"observation.images.front": pictures.astype(np.uint8)}
        records.append(EpisodeRecord(images=images, states=numbers, actions=numbers, instruction="go"))
    return write_lerobot(folder, records, fps=10, views=tuple(images), robot_type="arm")


def measure(data: Path, home: Path, given: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Samples per CPU second of each kind, `building` and `gathering`, a value a round."""
    rates: dict[str, dict[str, list[float]]] = {kind: {"building": [], "gathering": []} for kind in KINDS}
    for number in range(given.rounds):
        for kind in KINDS:
            config = CacheConfig(kind=kind, folder=home / str(number), memory=0)
            store = SourceConfig(path=data).open()
            began = time.process_time()
            (frames,) = open_frames([store], config, given.edge)
            rates[kind]["building"].append(len(frames) / (time.process_time() - began))
            random, began = np.random.default_rng(number), time.process_time()
            for _ in range(given.batches):
                frames[random.integers(0, len(frames), given.batch_size)]
            seconds = time.process_time() - began
            rates[kind]["gathering"].append(given.batches * given.batch_size / seconds)
    return rates


@prints_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in {"episodes": 8, "length": 60, "edge": 96, "rounds": 5, "batches": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULTS / "cache_kinds", help="without suffix")
    given, made = parser.parse_args(arguments), circumstances()
    with tempfile.TemporaryDirectory(prefix="tutti-cache-kinds-") as name:
        data = write(Path(name) / "set", given.episodes, given.length, given.edge)
        rates = measure(data, Path(name), given)
    rows: list[tuple[str, ...]] = []
    for kind in KINDS:
        row = [kind]
        for what in ("building", "gathering"):
            pairs = zip(rates[kind][what], rates["raw"][what], strict=True)
            ratio = spread([one / other for one, other in pairs])
            row += [f"{spread(rates[kind][what]).median:,.0f}", f"{ratio.median:.3g}"]
        rows.append(tuple(["none", "-", "-", *row[3:]] if kind == "none" else row))
    heads = ("kind", "building", "/ raw", "gathering", "/ raw")
    table = Table(title="Samples per CPU second", heads=heads, rows=tuple(rows))
    note = (
        f"{given.episodes} episodes of {given.length} frames of {given.edge} px, batches of "
        f"{given.batch_size}, {given.rounds} rounds in turns. {made_with(made)}"
    )
    publish(given.output, "benchmarks/cache_kinds", [table], [note], {"made": made, "rates": rates})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
