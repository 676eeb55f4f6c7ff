"""Pictures of HDF5 files into the frame cache: samples per CPU second, against a plain h5py loop.

python benchmarks/hdf5_speed.py    # half a minute of one core; the sets are written first

Both open the set, read every picture of one view, turn it upright, resize it and write it to a file. The
plain loop knows the layout beforehand, checks nothing, takes no digest, and does not bring its file to the
disk. They take turns, and CPU time of the process is counted: the load of the machine shows in it little.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from tables import RESULTS, Table, prints_user_errors, publish
from timing import spread

from tutti.data.cache import cached_frames
from tutti.data.formats.chosen import Chosen
from tutti.data.formats.hdf5.reader import HDF5Reader
from tutti.data.formats.mapped import MappedStore
from tutti.data.formats.wanted import Wanted
from tutti.runs.provenance import circumstances, made_with
from tutti.types import LABELS


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A layout with the edges of its pictures, and how they are stored."""

    group: str
    action: str
    view: str
    size: tuple[int, int]
    flipped: bool = False
    jpeg: bool = False
    gzip: bool = False


KINDS = {
    "LIBERO, raw 128 x 128": Kind(
        group="data/demo_0", action="actions", view="obs/agentview_rgb", size=(128, 128), flipped=True
    ),
    "robomimic, gzip 84 x 84": Kind(
        group="data/demo_0", action="actions", view="obs/agentview_image", size=(84, 84), gzip=True
    ),
    "ALOHA, JPEG 480 x 640": Kind(
        group="", action="action", view="observations/images/cam_high", size=(480, 640), jpeg=True
    ),
}


def write(folder: Path, kind: Kind, episodes: int, length: int) -> None:
    """Smooth moving pictures, a file an episode."""
    folder.mkdir(parents=True)
    y, x = np.mgrid[0 : kind.size[0], 0 : kind.size[1]].astype(np.float32)
    for episode in range(episodes):
        waves = (np.sin(x / 19 + t / 5 + episode) + np.cos(y / 17 - t / 7) for t in range(length))
        pictures = np.stack([np.stack([128 + 60 * w, 100 - 40 * w, 90 + 20 * w], -1) for w in waves])
        pictures = pictures.astype(np.uint8)
        with h5py.File(folder / f"episode_{episode}.hdf5", "w") as file:
            group = file.require_group(kind.group or "/")
            group[kind.action] = np.zeros((length, 7))
            group["observations/qpos" if kind.jpeg else "obs/ee_pos"] = np.zeros((length, 3))
            data = encoded(pictures) if kind.jpeg else pictures
            chunks = (1, *data.shape[1:]) if kind.jpeg else None
            compression = "gzip" if kind.gzip else None
            group.create_dataset(kind.view, data=data, chunks=chunks, compression=compression)


def encoded(pictures: np.ndarray) -> np.ndarray:
    """JPEG of quality 50, as ACT's scripts have it, padded with zeros."""
    contents: list[bytes] = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=50)
        contents.append(buffer.getvalue())
    longest = max(map(len, contents))
    return np.stack([np.frombuffer(one.ljust(longest, b"\0"), np.uint8) for one in contents])


def plain(folder: Path, kind: Kind, edge: int, out: Path) -> int:
    """The loop that one would write: frame by frame. Gives the number of pictures."""
    count = 0
    with out.open("wb") as file:
        for path in sorted(folder.iterdir(), key=lambda one: int(one.stem.split("_")[1])):
            with h5py.File(path, "r") as source:
                data = source[f"{kind.group}/{kind.view}"]
                for step in range(len(data)):
                    frame = data[step]
                    if kind.jpeg:
                        frame = np.asarray(Image.open(io.BytesIO(frame.tobytes())))
                    image = Image.fromarray(frame[::-1] if kind.flipped else frame)
                    small = image.resize((edge, edge), Image.Resampling.BILINEAR)
                    file.write(np.asarray(small).transpose(2, 0, 1).tobytes())
                    count += 1
    return count


def tutti(folder: Path, kind: Kind, edge: int, out: Path) -> int:
    """The frame cache, with the checks and the digests that name it."""
    del kind
    store = MappedStore(HDF5Reader(folder), Wanted(state=(), lag=0, fps=20.0), [unlabelled()])
    return len(cached_frames(store, out, edge))


def unlabelled() -> Chosen:
    """Every episode, whatever its labels."""
    return Chosen(labels=dict.fromkeys(LABELS, False))


def timed(kind: Kind, folder: Path, edge: int, rounds: int) -> Iterator[tuple[str, float, bytes]]:
    """(who, samples per CPU second, the bytes that came of it), in turns."""
    ways: dict[str, Callable[[Path, Kind, int, Path], int]] = {"plain": plain, "tutti": tutti}
    for _ in range(rounds):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory(prefix="tutti-hdf5-speed-") as place:
                out = Path(place) / "frames"
                began = time.process_time()
                count = way(folder, kind, edge, out)
                seconds = time.process_time() - began
                made = out if out.is_file() else next(out.rglob("frames.u8"))
                yield name, count / seconds, made.read_bytes()


@prints_user_errors
def main() -> int:
    """0 if the bytes are equal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=2)
    parser.add_argument("--length", type=int, default=100, help="frames in an episode")
    parser.add_argument("--edge", type=int, default=64, help="data.image_size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "hdf5_speed", help="without suffix")
    given = parser.parse_args()
    made, rows, result, equal = circumstances(), [], {}, True
    for title, kind in KINDS.items():
        folder = Path(tempfile.mkdtemp(prefix="tutti-hdf5-set-")) / "set"
        try:
            write(folder, kind, given.episodes, given.length)
            rates: dict[str, list[float]] = {"plain": [], "tutti": []}
            contents: set[bytes] = set()
            for name, rate, content in timed(kind, folder, given.edge, given.rounds):
                rates[name].append(rate)
                contents.add(content)
        finally:
            shutil.rmtree(folder.parent)
        equal = equal and len(contents) == 1
        ratio = spread([a / b for a, b in zip(rates["tutti"], rates["plain"], strict=True)])
        medians = [f"{spread(rates[name]).median:,.0f}" for name in ("plain", "tutti")]
        rows.append((title, *medians, f"{ratio.median:.2f}", f"{ratio.low:.2f} - {ratio.high:.2f}"))
        result[title] = rates
    heads = ("set", "plain loop", "Tutti", "Tutti / plain", "quartiles")
    table = Table(title="Samples per CPU second into the frame cache", heads=heads, rows=tuple(rows))
    note = (
        f"{given.episodes} episodes of {given.length} frames to {given.edge} px, {given.rounds} rounds in "
        f"turns; the bytes of both are {'equal' if equal else 'NOT equal'}. {made_with(made)}"
    )
    publish(given.output, "benchmarks/hdf5_speed", [table], [note], {"made": made, "rates": result})
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
