"""Loaders on the same data sets: LeRobot's own, a plain reader, and Tutti's in all its ways.

    python benchmarks/loader_speed.py [--lerobot /path/to/python/of/lerobot]    # 10 minutes of one core

Four LeRobotDatasets are written: video and PNG, of 96 and 224 px, two cameras, state, chunks of 50 actions.
All loaders take turns, each in one process on one thread; samples per second of CPU time are counted, and
ratios are of the same turn. LeRobot has an environment of its own, whose pins differ from Tutti's: without it
its rows are left out. The pictures of all are compared first. benchmarks/README.md says what each row means.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from tables import RESULTS, Table, prints_user_errors, publish
from timing import Spread, spread

from tutti.data import DataBundle, DataConfig
from tutti.data.cache import cached_frames
from tutti.data.cache.decoding import SHARD_BYTES
from tutti.data.formats.lerobot.pieces import EpisodeRecord, Storage
from tutti.data.formats.lerobot.writer import write_lerobot
from tutti.runs.provenance import circumstances, made_with
from tutti.runs.terminal import print_line
from tutti.storage.files import reserve
from tutti.types import DataNeeds, UserError

CHUNK, FPS = 50, 30
BATCH, TUTTI_BATCH = 16, 64
"""Samples of a batch: of a reader that makes each by itself, and of Tutti, by default."""
VIEWS = ("observation.images.front", "observation.images.wrist")
SETS: dict[str, tuple[Storage, int]] = {
    **{"video 96": ("video", 96), "PNG 96": ("image", 96)},
    **{"video 224": ("video", 224), "PNG 224": ("image", 224)},
}
PLAIN, IN_ORDER, LIVE, WRITING, BUILDING, WARM, ALL_ON, PAST = (
    "plain, random rows",
    "plain, opened and read in order",
    "Tutti, no cache",
    "as many bytes, written only",
    "Tutti, building the cache",
    "Tutti, warm cache",
    "warm, robots and labels",
    "warm, with history",
)
LEROBOT = {"LeRobot 0.6.1": False, "LeRobot, idea of PR 4314": True}
Timed = Callable[[float, int], tuple[int, float]]
"""From about how many CPU seconds, and the number of the turn, to samples and CPU seconds."""


def write(folder: Path, title: str, episodes: int, length: int, robot: str = "arm") -> Path:
    """A gradient, a square that moves, and noise."""
    storage, edge = SETS[title]
    random = np.random.default_rng(edge)
    y, x = np.mgrid[0:edge, 0:edge] * (200 / edge)

    def pictures(episode: int, view: int) -> np.ndarray:
        out = np.empty((length, edge, edge, 3), np.uint8)
        base = np.stack([x, y, np.full_like(x, 20 * view + 4 * episode)], -1)
        for step, picture in enumerate(out):
            picture[:] = (base + random.integers(0, 12, base.shape)).astype(np.uint8)
            at = (step * 3 + 7 * episode) % (edge - edge // 6)
            picture[at : at + edge // 6, at : at + edge // 6] = (230, 40 * view, 60)
        return out

    def record(episode: int) -> EpisodeRecord:
        numbers = random.normal(size=(2, length, 4)).astype(np.float32)
        images = {view: pictures(episode, number) for number, view in enumerate(VIEWS)}
        return EpisodeRecord(images=images, states=numbers[0], actions=numbers[1], instruction="go on")

    records = (record(episode) for episode in range(episodes))
    return write_lerobot(folder, records, fps=FPS, views=VIEWS, robot_type=robot, storage=storage)


class PlainReader:
    """What one would write by hand for one of these sets: numbers and encoded pictures in memory, videos kept
    open, each sample by itself in the order that it comes in, pictures as uint8. Nothing is checked."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("data/*/*.parquet"))
        table = pq.read_table(files)
        self.state, self.action = (
            np.stack(table[key].to_numpy()).astype(np.float32) for key in ("observation.state", "action")
        )
        episode, time = table["episode_index"].to_numpy(), table["timestamp"].to_numpy().astype(np.float64)
        self.end = np.searchsorted(episode, episode, side="right")
        self.encoded = {view: table[view].combine_chunks() for view in VIEWS if view in table.column_names}
        self.videos: dict[str, Any] = {}
        self.times: dict[str, np.ndarray] = {}
        meta = pq.read_table(sorted(folder.glob("meta/episodes/*/*.parquet")))
        for view in () if self.encoded else VIEWS:
            self.times[view] = meta[f"videos/{view}/from_timestamp"].to_numpy()[episode] + time
            (path,) = folder.glob(f"videos/{view}/*/*.mp4")
            container = av.open(str(path))
            stream = container.streams.video[0]
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            self.videos[view] = container, stream

    def __len__(self) -> int:
        return len(self.end)

    def picture(self, view: str, row: int) -> np.ndarray:
        """(h, w, 3) uint8."""
        if self.encoded:
            return np.asarray(Image.open(io.BytesIO(self.encoded[view][row]["bytes"].as_py())).convert("RGB"))
        (container, stream), wanted = self.videos[view], float(self.times[view][row])
        container.seek(int(wanted / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time >= wanted - 1e-4:
                return frame.to_ndarray(format="rgb24")
        raise UserError(f"{view} has no frame at {wanted} s")

    def batch(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """The samples of these rows."""
        pictures, chunks, masks = [], [], []
        for row in rows.tolist():
            pictures.append(np.stack([self.picture(view, row).transpose(2, 0, 1) for view in VIEWS]))
            steps = np.arange(row, row + CHUNK)
            masks.append(steps < self.end[row])
            chunks.append(self.action[np.minimum(steps, self.end[row] - 1)])
        parts = {"pictures": pictures, "actions": chunks, "mask": masks, "state": self.state[rows]}
        return {name: torch.from_numpy(np.stack(many)) for name, many in parts.items()}

    def timed(self, seconds: float, seed: int) -> tuple[int, float]:
        """Random rows, a batch at a time."""
        random = np.random.default_rng(seed)
        return _counted(lambda: len(self.batch(random.integers(len(self), size=BATCH))["state"]), seconds)


def in_order(folder: Path) -> Timed:
    """The plain reader opens the set and reads all of it, as the building of a cache does."""

    def timed(seconds: float, turn: int) -> tuple[int, float]:
        began = time.process_time()
        reader = PlainReader(folder)
        for rows in np.array_split(np.arange(len(reader)), len(reader) // BATCH):
            reader.batch(rows)
        return len(reader), time.process_time() - began

    return timed


def _counted(step: Callable[[], int], seconds: float) -> tuple[int, float]:
    """Samples and CPU seconds of steps for about so long, behind one that does not count."""
    step()
    began, count = time.process_time(), 0
    while (spent := time.process_time() - began) < seconds:
        count += step()
    return count, spent


def config(
    folders: Mapping[str, Path], home: Path, edge: int, kind: str, memory: int = 0, **data: Any
) -> DataConfig:
    """Tutti's loader over one set or several robots', as a training has it, without a thread of its own. So
    many MiB of pictures are kept where there is no cache."""
    sources = [{"path": str(path), "embodiment": robot} for robot, path in folders.items()]
    values = {
        **{
            "sources": sources,
            "horizon": CHUNK,
            "batch_size": TUTTI_BATCH,
            "image_size": edge,
            "prefetch": 0,
        },
        **{"validation_fraction": 0, "cache": {"kind": kind, "folder": str(home), "memory": memory}},
    }
    return DataConfig.model_validate(values | data)


def loading(data: DataBundle, scale: float = 1.0) -> Timed:
    """The loader's own batches."""
    batches = iter(data.train)

    def timed(seconds: float, turn: int) -> tuple[int, float]:
        count, spent = _counted(lambda: len(next(batches).window), seconds)
        return round(count * scale), spent

    return timed


def building(folder: Path, home: Path, edge: int) -> Timed:
    """The set is opened and its raw cache built in an empty folder: checks, digests and the way to the disk
    are part of it."""

    def timed(seconds: float, turn: int) -> tuple[int, float]:
        began = time.process_time()
        (part,) = config({"arm": folder}, home, edge, "raw").open()
        frames = cached_frames(part.store, home / f"built-{turn}", edge)
        spent = time.process_time() - began
        count = len(frames)
        shutil.rmtree(home / f"built-{turn}")
        return count, spent

    return timed


def writing(home: Path, bytes_each: int, count: int) -> Timed:
    """As many bytes as the cache holds, brought to the disk in the same pieces and nothing else: what memory
    and kernel of this machine ask for them, however they were made."""

    def timed(seconds: float, turn: int) -> tuple[int, float]:
        began, path = time.process_time(), home / f"written-{turn}"
        piece = np.ones((SHARD_BYTES // bytes_each) * bytes_each, np.uint8)
        with path.open("w+b") as file:
            reserve(file, count * bytes_each)
            for at in range(0, count * bytes_each, len(piece)):
                file.write(piece[: count * bytes_each - at].data)
                file.flush()
                os.fsync(file.fileno())
        spent = time.process_time() - began
        path.unlink()
        return count, spent

    return timed


def ways(folder: Path, other: Path, home: Path, edge: int, memory: int = 0) -> dict[str, Timed]:
    """All that is measured in this process."""
    robots = {"arm": folder, "other": other}
    alike: dict[str, Any] = {"slots": "canonical", "mixture": {"labelled": 0.5}}
    several = config(robots, home, edge, "raw", **alike)
    sources = [one.model_dump(mode="json", exclude_defaults=True) for one in several.sources]
    sources[1]["labels"] = {"actions": False}
    needs = DataNeeds()
    alike["sources"] = sources
    both = config(robots, home, edge, "raw", **alike)
    past = config(robots, home, edge, "raw", history=[-8, -4, 0], **alike)
    return {
        PLAIN: PlainReader(folder).timed,
        IN_ORDER: in_order(folder),
        # The plain reader has all encoded PNG pictures in memory; of videos neither keeps anything.
        LIVE: loading(config({"arm": folder}, home, edge, "none", memory).build(needs)),
        WRITING: writing(home, len(VIEWS) * 3 * edge**2, len(PlainReader(folder))),
        BUILDING: building(folder, home, edge),
        WARM: loading(config({"arm": folder}, home, edge, "raw").build(needs)),
        ALL_ON: loading(both.build(needs)),
        # Three times the pictures a sample: what is left is what history itself costs.
        PAST: loading(past.build(needs), 3.0),
    }


class LeRobot:
    """LeRobot's loader in its own environment (loader_speed_lerobot.py)."""

    def __init__(self, python: Path, scratch: Path) -> None:
        script = Path(__file__).with_name("loader_speed_lerobot.py")
        cache = {"HF_HOME": str(scratch / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self._scratch = scratch
        self._process = subprocess.Popen(
            [str(python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(scratch / "lerobot.log").open("w"),
            env={**os.environ, **cache, "PYTHONPATH": ""},
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request. Raises: UserError with what it said last if it has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            said = (self._scratch / "lerobot.log").read_text()
            raise UserError(f"LeRobot's loader has ended:\n{said[-1000:]}")
        return json.loads(line)

    def timed(self, folder: Path, idea: bool) -> Timed:
        """Its loader on a set."""

        def timed(seconds: float, turn: int) -> tuple[int, float]:
            found = self.ask(set=str(folder), idea=idea, seconds=seconds, seed=turn)
            return int(found["samples"]), float(found["seconds"])

        return timed

    def sample(self, folder: Path, idea: bool, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Pictures and actions of some rows."""
        out = self._scratch / "sample.npz"
        self.ask(set=str(folder), idea=idea, rows=list(rows), out=str(out))
        with np.load(out) as found:
            return {name: found[name] for name in found.files}

    def close(self) -> None:
        """Ends its process."""
        self._process.communicate()


@contextmanager
def lerobot(python: Path | None, scratch: Path) -> Iterator[LeRobot | None]:
    """LeRobot's loader, where there is a Python of its environment."""
    peer = LeRobot(python, scratch) if python else None
    try:
        yield peer
    finally:
        if peer:
            peer.close()


def differences(folder: Path, home: Path, edge: int, peer: LeRobot | None) -> dict[str, dict[str, float]]:
    """How far pictures and actions of some rows lie from those of Tutti's warm cache, loader by loader."""
    own = config({"arm": folder}, home, edge, "raw").build(DataNeeds()).windows
    live = config({"arm": folder}, home, edge, "none").build(DataNeeds()).windows
    rows = np.random.default_rng(1).permutation(len(own))[:64]
    batch, plain = own.gather(rows), PlainReader(folder)
    pictures = batch.observation.images.numpy()
    seen = {LIVE: live.gather(rows).observation.images.numpy()}
    read = plain.batch(rows)
    seen[PLAIN] = read["pictures"].numpy()
    chunks = read["actions"].numpy()
    found: dict[str, dict[str, float]] = {}
    for name, idea in LEROBOT.items():
        if peer is None:
            break
        theirs = peer.sample(folder, idea, rows.tolist())
        seen[name] = theirs["pictures"]
        found[name] = {"actions": float(np.abs(theirs["actions"] - chunks).max())}
    assert np.array_equal(read["mask"].numpy(), batch.action_mask[..., 0].numpy())
    for name, other in seen.items():
        off = np.abs(pictures.astype(int) - other)
        found.setdefault(name, {}).update(largest=float(off.max()), mean=float(off.mean()))
    return found


def measure(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Rates of every loader on every set, a value a turn, and the differences of pictures."""
    found: dict[str, Any] = {}
    with lerobot(given.lerobot, scratch) as peer:
        for title in given.sets:
            storage, edge = SETS[title]
            print_line(f"{title}: writing {given.episodes} episodes of {given.length} frames ...")
            home = scratch / title.replace(" ", "-")
            folder = write(home / "set", title, given.episodes, given.length)
            other = write(home / "other", title, max(2, given.episodes // 4), given.length, "other")
            off = differences(folder, home, edge, peer)
            timed = ways(folder, other, home, edge, 2048 if storage == "image" else 0)
            if peer is not None:
                timed |= {name: peer.timed(folder, idea) for name, idea in LEROBOT.items()}
            rates: dict[str, list[float]] = {name: [] for name in timed}
            for turn in range(given.turns + 1):
                for name, way in timed.items():
                    count, spent = way(given.seconds if turn else given.seconds / 4, turn)
                    if turn:
                        rates[name].append(count / spent)
            found[title] = {"rates": rates, "differences": off}
            shutil.rmtree(home)
            for name, many in rates.items():
                print_line(f"{title}: {name}: {spread(many).median:,.0f} samples per CPU second")
    return found


WANTED = (
    (LIVE, PLAIN, 1.0),
    (BUILDING, IN_ORDER, 1.0),
    (BUILDING, PLAIN, 1.0),
    (ALL_ON, WARM, 0.9),
    (PAST, WARM, 0.9),
)


def ratio(rates: Mapping[str, list[float]], name: str, base: str) -> Spread:
    """The rate of one over that of another in the same turn."""
    return spread([one / by for one, by in zip(rates[name], rates[base], strict=True)])


def table_of(title: str, found: Mapping[str, Any]) -> Table:
    """A line for each loader: its rate, and its rate over that of others in the same turn."""
    rates = found["rates"]
    names = [
        name
        for name in (*LEROBOT, PLAIN, IN_ORDER, LIVE, WRITING, BUILDING, WARM, ALL_ON, PAST)
        if name in rates
    ]
    bases = [name for name in (PLAIN, WARM, *LEROBOT) if name in rates]
    rows: list[tuple[str, ...]] = []
    for name in names:
        off = found["differences"].get(name)
        told = f"{off['largest']:.0f}; {off['mean']:.2g}" if off else "-"
        cells = [f"{ratio(rates, name, base).median:.3g}" for base in bases]
        rows.append((name, f"{spread(rates[name]).median:,.0f}", *cells, told))
    heads = ("loader", "samples/s", "/ plain", "/ warm", "/ LeRobot", "/ PR 4314")[: 2 + len(bases)]
    return Table(title=title, heads=(*heads, "pictures off by"), rows=tuple(rows))


def lines(found: Mapping[str, Any]) -> list[str]:
    """What was wanted, and whether it is so."""
    said: list[str] = []
    for title, one in found.items():
        for name, base, least in WANTED:
            value = ratio(one["rates"], name, base)
            said.append(
                f"{'PASS' if value.median >= least else 'FAIL'}: {title}: {name} / {base} {value.median:.2f} "
                f"({value.low:.2f} to {value.high:.2f}), wanted {least:g}"
            )
        equal = all(one["differences"][name]["largest"] == 0 for name in (PLAIN, LIVE))
        said.append(f"{'PASS' if equal else 'FAIL'}: {title}: pictures of plain reader and Tutti are equal")
    return said


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lerobot", type=Path, help="Python of an environment with lerobot 0.6.1")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--length", type=int, default=150, help="frames in an episode")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU time of a loader in a turn")
    parser.add_argument("--output", type=Path, default=RESULTS / "loader_speed", help="without suffix")
    return parser.parse_args(arguments)


@prints_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all is as wanted, 1 if not, 2 for a mistake of the user."""
    given, made = parse(arguments), circumstances()
    if given.lerobot:  # where it lies on this machine is nobody's business
        made["command"] = made["command"].replace(str(given.lerobot), "/path/to/python/of/lerobot")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="tutti-loader-speed-") as name:
        found = measure(given, Path(name))
    said = lines(found)
    note = (
        f"{given.episodes} episodes of {given.length} frames, 2 cameras, chunks of {CHUNK} actions, batches "
        f"of {BATCH} (Tutti {TUTTI_BATCH}, LeRobot on PNG 4) in random order; {given.turns} turns of "
        f"{given.seconds:g} CPU seconds each, medians and quartiles. {made_with(made)}"
    )
    tables = [table_of(title, one) for title, one in found.items()]
    publish(given.output, "benchmarks/loader_speed", tables, [*said, note], {"made": made, **found})
    return int(any(line.startswith("FAIL") for line in said))


if __name__ == "__main__":
    sys.exit(main())
