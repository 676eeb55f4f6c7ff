"""How fast RLDS sets are indexed and parsed: megabytes a second and core, on a synthetic set like BridgeData.

python benchmarks/rlds_speed.py writes 500 MB of episodes of 38 steps with two pictures of 18 kB, which are
random bytes, and reads them from the system's page cache. No picture is decoded.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import rlds_sets as sets
from tables import RESULTS, Table, prints_user_errors, publish
from timing import Spread, spread

from tutti.data.formats.rlds.example import Record
from tutti.data.formats.rlds.reader import RldsReader
from tutti.data.formats.rlds.records import read_record, scan_records
from tutti.runs.provenance import circumstances, made_with
from tutti.runs.terminal import print_line

STEPS, PICTURE_BYTES, SHARDS = 38, 18_000, 5
VIEWS = ("observation/image_0", "observation/image_1")
NUMBERS = {"observation/state": 7, "action": 7}
INDEX, LEARNT, ALL = "index", "state, action and text", "every feature, pictures as stored"


def write(folder: Path, megabytes: float) -> Path:
    """The set; its size is met within an episode."""
    generator = np.random.default_rng(0)
    count = max(SHARDS, round(megabytes * 1e6 / (len(VIEWS) * STEPS * PICTURE_BYTES)))

    def episode() -> bytes:
        values: dict[str, sets.Values] = {**sets.flags_of(STEPS)}
        values |= {f"steps/{view}": [generator.bytes(PICTURE_BYTES) for _ in range(STEPS)] for view in VIEWS}
        values |= {f"steps/{key}": generator.random((STEPS, dim), np.float32) for key, dim in NUMBERS.items()}
        return sets.example({**values, "steps/language_instruction": [b"put the pot on the stove"] * STEPS})

    shards = [range(shard, count, SHARDS) for shard in range(SHARDS)]
    steps = {view: sets.image(256, 256, 3) for view in VIEWS} | {"language_instruction": sets.TEXT}
    features = sets.episodes_of(steps | {key: sets.tensor(dim) for key, dim in NUMBERS.items()})
    records = {"train": [(episode() for _ in shard) for shard in shards]}
    return sets.write_set(folder, "bridge_orig", features, records)


def read_learnt(folder: Path) -> None:
    """What a source reads of each episode before any picture."""
    reader = RldsReader(folder)
    for number in range(len(reader.lengths)):
        for key in NUMBERS:
            reader.numbers(key, number)
        reader.texts("language_instruction", number)


def read_all(folder: Path) -> None:
    """Every feature of each episode, pictures as encoded bytes."""
    for path in sorted(folder.glob("*.tfrecord-*")):
        for place in scan_records(path, "steps/is_first"):
            record = Record(read_record(path, place), str(path))
            for view in (*VIEWS, "language_instruction"):
                list(record.values(f"steps/{view}", "bytes_list", STEPS) or ())
            for key, dim in NUMBERS.items():
                np.array(record.values(f"steps/{key}", "float_list", STEPS * dim), np.float32)
            for flag in sets.flags_of(STEPS):
                np.array(record.values(flag, "int64_list", STEPS))


def measure(folder: Path, rounds: int) -> dict[str, Spread]:
    """Seconds of CPU time of each reading, in turns behind one that fills the page cache."""
    readings: dict[str, Callable[[Path], object]] = {INDEX: RldsReader, LEARNT: read_learnt, ALL: read_all}
    times: dict[str, list[float]] = {name: [] for name in readings}
    for number in range(rounds + 1):
        for name, reading in readings.items():
            started = time.thread_time()
            reading(folder)
            if number:
                times[name].append(time.thread_time() - started)
    return {name: spread(values) for name, values in times.items()}


def table_of(seconds: dict[str, Spread], size: int, episodes: int) -> Table:
    """A line for each reading."""
    rows = [
        (
            *(name, f"{size / 1e6 / one.median:,.0f}"),
            f"{size / 1e6 / one.high:,.0f} to {size / 1e6 / one.low:,.0f}",
            *(f"{1e3 * one.median:.0f}", f"{1e6 * one.median / episodes:.0f}"),
        )
        for name, one in seconds.items()
    ]
    heads = ("reading", "MB/s a core", "quartiles", "ms in all", "us an episode")
    return Table(title=f"RLDS, {size / 1e6:.0f} MB in {episodes} episodes", heads=heads, rows=tuple(rows))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=500, help="size of the set")
    parser.add_argument("--rounds", type=int, default=5, help="counted turns")
    parser.add_argument("--output", type=Path, default=RESULTS / "rlds_speed", help="without suffix")
    return parser.parse_args(arguments)


@prints_user_errors
def main(given: Sequence[str] | None = None) -> int:
    """0, or 2 for a mistake of the user."""
    arguments, found_in = parse(given), circumstances()
    with tempfile.TemporaryDirectory(prefix="tutti-benchmark-") as name:
        print_line(f"writing {arguments.megabytes:g} MB below {name} ...")
        folder = write(Path(name), arguments.megabytes)
        size = sum(path.stat().st_size for path in folder.glob("*.tfrecord-*"))
        episodes = len(RldsReader(folder).lengths)
        seconds = measure(folder, arguments.rounds)
    notes = [
        "Seconds are CPU time of one thread, of the system's part too; the files lie in the page cache. "
        "`index` is the opening: headers, checksums of lengths, steps of each episode. "
        "The other two begin with an index, verify the checksum of all data, and decode no picture.",
        f"{arguments.rounds} turns behind one that is not counted. {made_with(found_in)}",
    ]
    result = {**found_in, "bytes": size, "episodes": episodes}
    result["seconds"] = {reading: asdict(one) for reading, one in seconds.items()}
    publish(arguments.output, "benchmarks/rlds_speed", [table_of(seconds, size, episodes)], notes, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
