"""One episode made ready for a LeRobotDataset v3.0: its columns, texts and counts; beside it, its videos."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, UInt8
from PIL import Image

from tutti.data.formats.lerobot import ACTION, STATE
from tutti.data.formats.lerobot.video import VideoWriter
from tutti.errors import UserError
from tutti.storage.files import write_folder

Counted = tuple[int, np.ndarray]
"""Of an episode: the number of frames looked at, and its numbers (t, k) or counts of bytes (c, 256)."""
_QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
_BIG_PICTURE = 300
_FEWEST_FRAMES = 100
Storage = Literal["image", "video"]
PARQUET: dict[str, Any] = {"compression": "snappy", "write_page_checksum": True}
"""How tables are written: a flipped bit is found when a page is read."""
ROWS = "rows.parquet"
_BLOCK = 64
"""Pictures of a view in memory at once, where they need not all be."""


@runtime_checkable
class Pictures(Protocol):
    """An episode's pictures of a view, (t, h, w, 3) bytes: an array, or what decodes them when they are asked
    for."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, frames: slice, /) -> UInt8[np.ndarray, "k h w 3"]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRecord:
    """One episode to be stored, in data units.

    `images` maps each view's feature key (such as "observation.images.right") to its pictures; `extra`
    maps further feature keys (such as "observation.environment_state") to float vectors. `instruction` is one
    for all frames, or one for each. States and actions without numbers (t, 0) are no features.
    """

    images: Mapping[str, Pictures]
    states: Float32[np.ndarray, "t s"]
    actions: Float32[np.ndarray, "t a"]
    instruction: str | tuple[str, ...]
    extra: dict[str, Float32[np.ndarray, "t _"]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What of an episode does not depend on its place in the data set. `columns` are those of the data file
    but for places; `shapes` and `counted` are those of every feature, videos too; `texts` has each
    instruction behind the frame at which it begins.
    """

    length: int
    columns: dict[str, pa.Array]
    shapes: dict[str, list[int]]
    counted: dict[str, Counted]
    texts: tuple[tuple[int, str], ...]


def prepare(
    episode: EpisodeRecord,
    name: str,
    pool: Executor,
    film: Mapping[str, Callable[[Iterator[UInt8[np.ndarray, "h w 3"]]], None]],
    *,
    unknown: bool = False,
) -> Piece:
    """Makes an episode ready, `name` in messages: `film` takes the pictures of the views that are videos, the
    others become PNG. With `unknown` a row of NaN alone may be there, which has no numbers.

    Raises: UserError for unequal lengths, fewer than 2 frames, and numbers that are not finite.
    """
    vectors = _vectors(episode)
    lengths = {key: len(value) for key, value in {**episode.images, **vectors}.items()}
    length = len(episode.actions)
    if len(set(lengths.values())) != 1 or length < 2:
        raise UserError(f"{name}: expected one length of at least 2 frames for all, found {lengths}.")
    for key, value in vectors.items():
        wrong = ~np.isfinite(value)
        if unknown:
            wrong &= ~np.isnan(value).all(axis=1, keepdims=True)
        if wrong.any():
            step, dimension = np.argwhere(wrong)[0].tolist()
            raise UserError(f"{name}: {key} is {value[step, dimension]} at {step=}, {dimension=}.")
    columns: dict[str, pa.Array] = {}
    counted: dict[str, Counted] = {}
    for view, pictures in episode.images.items():
        counts = PictureCounts(length)
        frames = _one_by_one(pictures, counts)
        if view in film:
            film[view](frames)
        else:
            columns[view] = png_column(frames, pool)
        counted[view] = counts.counted
    for key, value in vectors.items():
        columns[key], counted[key] = vector_column(value), count_values(value)
    said = episode.instruction
    texts = said if isinstance(said, tuple) else (said,)
    begins = [frame for frame, text in enumerate(texts) if frame == 0 or texts[frame - 1] != text]
    return Piece(
        length=length,
        columns=columns,
        shapes=shapes_of(episode),
        counted=counted,
        texts=tuple((frame, texts[frame]) for frame in begins),
    )


def shapes_of(episode: EpisodeRecord) -> dict[str, list[int]]:
    """The shape of each feature at one frame."""
    return {key: list(value.shape[1:]) for key, value in {**episode.images, **_vectors(episode)}.items()}


def _vectors(episode: EpisodeRecord) -> dict[str, np.ndarray]:
    every = {STATE: episode.states, ACTION: episode.actions, **episode.extra}
    return {key: value for key, value in every.items() if value.shape[1]}


def _one_by_one(pictures: Pictures, counts: PictureCounts) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    for begin in range(0, len(pictures), _BLOCK):
        block = pictures[begin : begin + _BLOCK]
        counts.add(begin, block)
        yield from block


def png_column(images: Iterator[UInt8[np.ndarray, "h w 3"]], pool: Executor) -> pa.Array:
    """Pictures as a column of PNG files, as `datasets` stores them."""
    items: list[dict[str, Any]] = []
    while some := list(islice(images, _BLOCK)):
        # Pillow releases the GIL while it compresses, so two threads use two cores.
        for png in pool.map(_png, some):
            items.append({"bytes": png, "path": f"frame-{len(items):06d}.png"})
    return pa.array(items, type=pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def _png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def vector_column(values: np.ndarray) -> pa.Array:
    """(t, k) to fixed_size_list<T>[k]; (t,) or (t, 1) to plain numbers."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    width = values.shape[1] if values.ndim > 1 else 1
    return flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)


def save_piece(
    folder: Path, episode: EpisodeRecord, name: str, pool: Executor, *, fps: float, storage: Storage
) -> None:
    """Writes an episode into a folder of its own, which is there as a whole or not at all: the columns as
    Parquet, and where views are stored as videos each as an mp4 file.

    Raises: UserError as `prepare`, and for sizes that cannot be video.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with write_folder(folder) as partial:

        def film(view: str) -> Callable[[Iterator[UInt8[np.ndarray, "h w 3"]]], None]:
            def write(frames: Iterator[UInt8[np.ndarray, "h w 3"]]) -> None:
                writer = VideoWriter(partial, view, "{video_key}.mp4", fps)
                writer.describe(list(episode.images[view].shape[1:]))
                writer.add(frames)
                writer.close()

            return write

        films = {view: film(view) for view in episode.images} if storage == "video" else {}
        piece = prepare(episode, name, pool, films, unknown=True)
        pictures = {key: piece.counted[key] for key in episode.images}
        described = {
            "length": piece.length,
            "shapes": piece.shapes,
            "texts": piece.texts,
            "pictures": {key: [count, levels.tolist()] for key, (count, levels) in pictures.items()},
        }
        table = pa.table(piece.columns or {"none": np.zeros(piece.length)})
        table = table.replace_schema_metadata({"piece": json.dumps(described)})
        pq.write_table(table, partial / ROWS, row_group_size=piece.length, **PARQUET)


def load_piece(folder: Path) -> Piece:
    """What `save_piece` wrote, without the videos."""
    table = pq.read_table(folder / ROWS, use_threads=False)
    described = json.loads((table.schema.metadata or {})[b"piece"])
    counted: dict[str, Counted] = {
        key: (count, np.array(levels)) for key, (count, levels) in described["pictures"].items()
    }
    columns: dict[str, Any] = {
        key: table[key].combine_chunks() for key in described["shapes"] if key in table.column_names
    }
    for key, column in columns.items():
        if key not in counted:
            values: Any = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
            counted[key] = count_values(values.to_numpy().reshape(len(column), -1))
    return Piece(
        length=described["length"],
        columns=columns,
        shapes=described["shapes"],
        counted=counted,
        texts=tuple((frame, text) for frame, text in described["texts"]),
    )


def count_values(values: np.ndarray) -> Counted:
    """Of (t, k) or (t,) numbers. Rows of NaN alone, which have none, do not count."""
    rows = values.reshape(len(values), -1).astype(np.float64)
    rows = rows[~np.isnan(rows).all(axis=1)]
    return len(rows), rows


class PictureCounts:
    """Counts the bytes of an episode's pictures as they come: of max(100, n^0.75) frames, strided from 300
    pixels."""

    def __init__(self, length: int) -> None:
        wanted = min(length, max(_FEWEST_FRAMES, int(length**0.75)))
        self._rows = np.linspace(0, length - 1, wanted).round().astype(np.int64)
        self.levels = np.zeros((3, 256), np.int64)

    def add(self, begin: int, pictures: UInt8[np.ndarray, "k h w 3"]) -> None:
        """The pictures from frame `begin` on."""
        rows = self._rows[(self._rows >= begin) & (self._rows < begin + len(pictures))] - begin
        size = pictures.shape[1:3]
        stride = max(1, min(size) // 150) if max(size) >= _BIG_PICTURE else 1
        sample = pictures[rows, ::stride, ::stride]
        self.levels += np.stack([np.bincount(sample[..., c].ravel(), minlength=256) for c in range(3)])

    @property
    def counted(self) -> Counted:
        """The number of frames looked at, and the counts."""
        return len(self._rows), self.levels


def summarize(episodes: Sequence[Counted]) -> dict[str, list[Any]]:
    """min, max, mean, std, count and quantiles as nested lists, in the shapes and order that LeRobot writes.

    Those of pictures are (C, 1, 1) in [0, 1]. LeRobot 0.6.1 stores the mean of the episodes' quantiles for a
    data set; these are the true quantiles of all values.
    """
    count, parts = sum(frames for frames, _ in episodes), [part for _, part in episodes]
    found: dict[str, Any] = {}
    if parts[0].dtype == np.float64:
        values, shape = np.concatenate(parts), (-1,)
        values = values if len(values) else np.zeros((1, values.shape[1]))
        found |= {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
        quantiles = dict(zip(_QUANTILES, np.quantile(values, [*_QUANTILES.values()], axis=0), strict=True))
    else:
        histogram, level, shape = np.sum(parts, axis=0), np.arange(256) / 255.0, (-1, 1, 1)
        share = histogram / histogram.sum(1, keepdims=True)
        mean, counted, cumulative = share @ level, histogram > 0, np.cumsum(share, axis=1)
        found |= {"min": level[counted.argmax(1)], "max": level[255 - counted[:, ::-1].argmax(1)]}
        found |= {"mean": mean, "std": np.sqrt(np.maximum(share @ level**2 - mean**2, 0.0))}
        quantiles = {k: level[(cumulative >= q - 1e-12).argmax(1)] for k, q in _QUANTILES.items()}
    found |= {"count": None, **quantiles}
    return {k: [count] if k == "count" else v.reshape(shape).tolist() for k, v in found.items()}
