"""Start-up and memory from 10^2 to 10^5 episodes: of one process, and of eight that share the numbers.

    python benchmarks/data_scale.py [--episodes 100 1000 10000 100000]    # 6 minutes; 3 GB of disk

A LeRobotDataset of so many episodes of 100 frames is written below TMPDIR, state and action of 7 numbers; its
videos are the same file over and over. It is opened as a training opens it, without a cache of frames: first
with nothing kept, then again, then by eight processes at once, which take some batches and wait. Private
memory is that of /proc/PID/smaps_rollup: pages that no other process shares (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tables import RESULTS, Table, prints_user_errors, publish

from tutti.data.formats.lerobot.pieces import EpisodeRecord
from tutti.data.formats.lerobot.writer import write_lerobot
from tutti.runs.provenance import circumstances, made_with
from tutti.runs.terminal import print_line
from tutti.types import UserError

BLOCK, LENGTH, DIM, EDGE, VIEW = 100, 100, 7, 64, "observation.images.front"
MOST_SECONDS, MOST_BYTES = 5.0, 2**30


def first_block(folder: Path) -> Path:
    """The episodes of which all others are made."""
    random = np.random.default_rng(0)
    picture = random.integers(0, 256, (1, EDGE, EDGE, 3), dtype=np.uint8)
    pictures = np.broadcast_to(picture, (LENGTH, EDGE, EDGE, 3))

    def records() -> Any:
        for number in range(BLOCK):
            values = random.normal(size=(2, LENGTH, DIM)).astype(np.float32)
            yield EpisodeRecord(
                images={VIEW: pictures},
                states=values[0],
                actions=values[1],
                instruction=f"task {number % 10}",
            )

    return write_lerobot(folder, records(), fps=10, views=(VIEW,), robot_type="arm", storage="video")


def multiplied(block: Path, folder: Path, blocks: int) -> Path:
    """The set with all files of the block so many times: other numbers, the same video."""
    info = json.loads((block / "meta" / "info.json").read_text())
    info |= {"total_episodes": BLOCK * blocks, "total_frames": BLOCK * LENGTH * blocks}
    info["splits"] = {"train": f"0:{BLOCK * blocks}"}
    (folder / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    for name in ("tasks.parquet", "stats.json"):
        if (block / "meta" / name).exists():
            (folder / "meta" / name).write_bytes((block / "meta" / name).read_bytes())
    (data,), (video,) = block.glob("data/*/*.parquet"), block.glob(f"videos/{VIEW}/*/*.mp4")
    rows, (meta,) = pq.read_table(data), block.glob("meta/episodes/*/*.parquet")
    episodes, tables = pq.read_table(meta), list[pa.Table]()
    for number in range(blocks):
        chunk, file = divmod(number, 1000)
        random, table, entry = np.random.default_rng(number), rows, episodes
        for key in ("observation.state", "action"):
            values = random.normal(size=(len(rows), DIM)).astype(np.float32)
            column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), DIM).cast(rows[key].type)
            table = table.set_column(table.column_names.index(key), key, column)
        table = _moved(table, {"index": number * BLOCK * LENGTH, "episode_index": number * BLOCK})
        names = {
            **{"episode_index": number * BLOCK, "dataset_from_index": number * BLOCK * LENGTH},
            **{
                "dataset_to_index": number * BLOCK * LENGTH,
                "data/chunk_index": chunk,
                "data/file_index": file,
            },
            **{f"videos/{VIEW}/chunk_index": chunk, f"videos/{VIEW}/file_index": file},
        }
        tables.append(_moved(entry, names))
        for kind, ending in (("data", "parquet"), (f"videos/{VIEW}", "mp4")):
            path = folder / kind / f"chunk-{chunk:03d}" / f"file-{file:03d}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if ending == "mp4":
                os.link(video, path)
            else:
                pq.write_table(table, path, row_group_size=len(table))
    pq.write_table(pa.concat_tables(tables), folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    return folder


def _moved(table: pa.Table, by: dict[str, int]) -> pa.Table:
    """Columns with a number added."""
    for key, amount in by.items():
        values = pa.array(table[key].to_numpy() + amount).cast(table[key].type)
        table = table.set_column(table.column_names.index(key), key, values)
    return table


def opened(folder: Path, home: Path) -> None:
    """In a process of its own: opens the set, takes batches, says how long it took, and waits."""
    import torch

    from tutti.data import DataConfig
    from tutti.types import DataNeeds

    torch.set_num_threads(1)
    cache = {"kind": "none", "folder": str(home), "memory": 0}
    values = {"sources": [{"path": str(folder)}], "cache": cache, "image_size": EDGE, "batch_size": 16}
    config = DataConfig.model_validate(values | {"validation_fraction": 0.01, "prefetch": 0})
    began, cpu = time.perf_counter(), time.process_time()
    data = config.build(DataNeeds())
    seconds, spent = time.perf_counter() - began, time.process_time() - cpu
    for _ in range(3):
        next(data.train)
    print(json.dumps({"seconds": seconds, "cpu": spent, "windows": len(data.windows)}), flush=True)
    sys.stdin.read()


def private(pid: int) -> int:
    """Bytes of a process that no other shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def together(folder: Path, home: Path, count: int) -> list[dict[str, Any]]:
    """What `count` processes at once say, with the private memory of each while all of them wait."""
    command = [sys.executable, __file__, "--open", str(folder), str(home)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started: list[Any] = [subprocess.Popen(command, **pipes) for _ in range(count)]
    try:
        said = [process.stdout.readline() for process in started]
        if not all(said):
            raise UserError(f"a process that opens {folder} has ended")
        found = [json.loads(line) for line in said]
        for one, process in zip(found, started, strict=True):
            one["private"] = private(process.pid)
        return found
    finally:
        for process in started:
            process.communicate()


@prints_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all is as wanted, 1 if not, 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--open", type=Path, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS / "data_scale", help="without suffix")
    given = parser.parse_args(arguments)
    if given.open:
        opened(*given.open)
        return 0
    made, found = circumstances(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="tutti-data-scale-") as name:
        block = first_block(Path(name) / "block")
        for episodes in given.episodes:
            folder = multiplied(block, Path(name) / str(episodes), max(1, episodes // BLOCK))
            home = Path(name) / f"cache-{episodes}"
            cold, warm = (together(folder, home, 1)[0] for _ in range(2))
            many = together(folder, home, given.processes)
            one = {"episodes": episodes, "cold": cold, "warm": warm, "together": many}
            found.append(one)
            total = sum(each["private"] for each in many)
            print_line(
                f"{episodes:,} episodes: {cold['seconds']:.1f} s at first, {warm['seconds']:.1f} s again; "
                f"{given.processes} processes hold {total / 2**20:,.0f} MiB of their own"
            )
    held = [sum(each["private"] for each in one["together"]) for one in found]
    rows = tuple(
        (
            *(f"{one['episodes']:,}", f"{one['warm']['windows']:,}"),
            *(f"{one[kind][what]:.2f}" for kind in ("cold", "warm") for what in ("seconds", "cpu")),
            *(f"{own / 2**20:,.0f}", f"{(own - held[0]) / 2**20:+,.0f}"),
        )
        for one, own in zip(found, held, strict=True)
    )
    heads = ("episodes", "frames", "first: s", "CPU s", "again: s", "CPU s", "private MiB, all", "grown")
    slowest, grown = max(one["warm"]["seconds"] for one in found), max(held) - held[0]
    said = [
        f"{'PASS' if slowest < MOST_SECONDS else 'FAIL'}: opened again in {slowest:.1f} s, wanted under 5",
        f"{'PASS' if grown < MOST_BYTES else 'FAIL'}: {given.processes} processes grow by "
        f"{grown / 2**20:,.0f} MiB of their own, wanted under 1,024",
    ]
    table = Table(title="Start-up and memory by episodes", heads=heads, rows=rows)
    result = {"made": made, "found": found}
    publish(given.output, "benchmarks/data_scale", [table], [*said, made_with(made)], result)
    return int(any(line.startswith("FAIL") for line in said))


if __name__ == "__main__":
    sys.exit(main())
