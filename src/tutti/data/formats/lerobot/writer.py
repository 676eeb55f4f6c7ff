"""Writes a LeRobotDataset v3.0 folder: pictures as PNG columns or as videos; atomic and deterministic."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, UInt8
from PIL import Image

from tutti.data.episodes import Progress
from tutti.data.formats.lerobot import ACTION, STATE
from tutti.data.formats.lerobot.video import FILE_BYTES, FILES_PER_CHUNK, VideoWriter
from tutti.errors import UserError
from tutti.storage.files import explain_full_disk, megabytes, partial_path, write_folder
from tutti.types import UNNAMED, Dimensions

DATA_FILE_BYTES = 100 * 2**20
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
PARQUET: dict[str, Any] = {"compression": "snappy", "write_page_checksum": True}
"""How tables are written: a flipped bit is found when a page is read."""
Storage = Literal["image", "video"]

_SCALARS = {"timestamp": "float32"} | dict.fromkeys(
    ("frame_index", "episode_index", "index", "task_index"), "int64"
)
_QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
_BIG_PICTURE = 300
_FEWEST_FRAMES = 100

_Counted = tuple[int, np.ndarray]
"""Of an episode: the number of frames looked at, and its numbers (t, k) or counts of bytes (c, 256)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRecord:
    """One episode to be stored, in data units.

    `images` maps each view's feature key (such as "observation.images.right") to its pictures; `extra`
    maps further feature keys (such as "observation.environment_state") to float vectors.
    """

    images: dict[str, UInt8[np.ndarray, "t _ _ 3"]]
    states: Float32[np.ndarray, "t s"]
    actions: Float32[np.ndarray, "t a"]
    instruction: str
    extra: dict[str, Float32[np.ndarray, "t _"]] = field(default_factory=dict)


def write_lerobot(
    folder: Path,
    episodes: Iterable[EpisodeRecord],
    *,
    fps: int | float,
    views: tuple[str, ...],
    robot_type: str,
    storage: Storage = "image",
    dimensions: Dimensions = UNNAMED,
    beside: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes all `episodes` to `folder`, which must not exist yet; gives `folder` back.

    Everything is written to a hidden folder and renamed at the end, so `folder` is either complete or
    absent. The same episodes give the same bytes (with the same library versions). `episodes` is read
    once and may be a generator; one episode at a time is held in memory. `dimensions` says what the
    numbers are: names as LeRobot has them, units in a key `units` beside them. `beside` has the names and
    texts of further files of the folder, which LeRobot does not read.

    Raises UserError if the folder exists, an episode does not fit the first one, or the disk is full.
    """
    if folder.exists():
        raise UserError(
            f"{folder} exists already and is not overwritten.\n"
            "  cure: choose another folder, or delete this one first."
        )
    written = 0

    def needed() -> str:
        used = sum(path.stat().st_size for path in partial_path(folder).rglob("*") if path.is_file())
        return f"about {megabytes(used / max(1, written))} an episode; {written} were written before"

    with write_folder(folder) as partial, explain_full_disk(folder, "a LeRobot data set", needed):
        with closing(
            _DatasetWriter(
                partial, fps=fps, views=views, robot_type=robot_type, storage=storage, dimensions=dimensions
            )
        ) as writer:
            for written, episode in enumerate(episodes):
                writer.add(episode)
                if progress is not None:
                    progress(written + 1, 0)
            writer.finish()
        for name, text in (beside or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
    return folder


class _DatasetWriter:
    """The open files of a data set being written; `add` each episode, then `finish`."""

    def __init__(
        self,
        folder: Path,
        *,
        fps: int | float,
        views: tuple[str, ...],
        robot_type: str,
        storage: Storage,
        dimensions: Dimensions,
    ) -> None:
        for view in views:
            if not view.startswith("observation.image") or "/" in view:
                raise UserError(
                    f"views: {view!r} is no LeRobot camera key.\n"
                    "  expected: 'observation.images.<camera>' or 'observation.image', without '/'."
                )
        if not fps > 0:
            raise UserError(f"fps: expected a positive number, found {fps}.")
        self.folder = folder
        self.fps: int | float = int(fps) if float(fps).is_integer() else float(fps)
        self.views, self.robot_type, self.storage = views, robot_type, storage
        self.dimensions = dimensions
        self.features: dict[str, dict[str, Any]] = {}
        self.tasks: dict[str, int] = {}
        self.counted: dict[str, list[_Counted]] = {}
        self.rows: list[dict[str, Any]] = []
        self.num_frames = 0
        self._pool = ThreadPoolExecutor(max_workers=2)
        self._videos: dict[str, VideoWriter] = {}
        self._parquet: pq.ParquetWriter | None = None
        self._data_file, self._data_bytes = -1, 0

    def close(self) -> None:
        """Closes what is open, finished or not."""
        with ExitStack() as stack:
            stack.callback(self._pool.shutdown)
            for open_file in (*self._videos.values(), self._parquet):
                if open_file is not None:
                    stack.callback(open_file.close)

    def add(self, episode: EpisodeRecord) -> None:
        """Appends one episode to the data file, the videos, the statistics and the episode table."""
        vectors: dict[str, np.ndarray] = {STATE: episode.states, ACTION: episode.actions, **episode.extra}
        self._check(episode, vectors)
        length, number = len(episode.actions), len(self.rows)
        task = self.tasks.setdefault(episode.instruction, len(self.tasks))
        frame = np.arange(length, dtype=np.int64)
        columns = {view: episode.images[view] for view in self.views} | vectors
        columns |= {"timestamp": (frame / self.fps).astype(np.float32), "frame_index": frame}
        columns |= {"episode_index": np.full(length, number), "index": self.num_frames + frame}
        columns["task_index"] = np.full(length, task)
        row: dict[str, Any] = {"episode_index": number, "tasks": [episode.instruction], "length": length}
        row["dataset_from_index"] = self.num_frames
        row["dataset_to_index"] = self.num_frames = self.num_frames + length
        for view, video in self._videos.items():
            values = video.add(columns[view])
            names = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
            row |= {f"videos/{view}/{name}": value for name, value in zip(names, values, strict=True)}
        file = self._write_rows({k: v for k, v in columns.items() if k not in self._videos})
        row |= {"data/chunk_index": file // FILES_PER_CHUNK, "data/file_index": file % FILES_PER_CHUNK}
        for key, values in columns.items():
            counted = _count_values(values)
            self.counted.setdefault(key, []).append(counted)
            row |= {f"stats/{key}/{name}": value for name, value in _summarize([counted]).items()}
        self.rows.append(row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})

    def finish(self) -> None:
        """Writes the tables of tasks and episodes, the statistics and info.json."""
        if not self.rows:
            raise UserError(f"{self.folder.stem}: no episodes to write; expected at least one.")
        self.close()
        meta = self.folder / "meta"
        (self.folder / EPISODES_PATH).parent.mkdir(parents=True)
        table = pa.Table.from_pylist(self.rows)
        pq.write_table(table, self.folder / EPISODES_PATH, row_group_size=10, **PARQUET)
        pq.write_table(_tasks_table(tuple(self.tasks)), meta / "tasks.parquet", **PARQUET)
        info = {
            "codebase_version": "v3.0",
            "robot_type": self.robot_type,
            "total_episodes": len(self.rows),
            "total_frames": self.num_frames,
            "total_tasks": len(self.tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": DATA_FILE_BYTES // 2**20,
            "video_files_size_in_mb": FILE_BYTES // 2**20,
            "fps": self.fps,
            "splits": {"train": f"0:{len(self.rows)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self.storage == "video" else None,
            "features": self.features,
        }
        stats = {key: _summarize(counted) for key, counted in self.counted.items()}
        for name, value in (("stats", stats), ("info", info)):
            (meta / f"{name}.json").write_text(json.dumps(value, indent=4), encoding="utf-8")

    def _check(self, episode: EpisodeRecord, vectors: dict[str, np.ndarray]) -> None:
        """Fixes the features by the first episode and holds every later one to them."""
        name = f"Episode {len(self.rows)} ({episode.instruction!r})"
        if set(episode.images) != set(self.views):
            raise UserError(f"{name}: expected the views {self.views}, found {tuple(episode.images)}.")
        lengths = {key: len(value) for key, value in {**episode.images, **vectors}.items()}
        if len(set(lengths.values())) != 1 or len(episode.actions) < 2:
            raise UserError(f"{name}: expected one length of at least 2 frames for all, found {lengths}.")
        for key, value in vectors.items():
            if not np.isfinite(value).all():
                step, dimension = np.argwhere(~np.isfinite(value))[0].tolist()
                raise UserError(f"{name}: {key} is {value[step, dimension]} at {step=}, {dimension=}.")
        shapes = {key: list(episode.images[key].shape[1:]) for key in self.views}
        shapes |= {key: list(value.shape[1:]) for key, value in vectors.items()}
        if not self.rows:
            self._declare(shapes)
        known = {key: self.features[key]["shape"] for key in self.features if key not in _SCALARS}
        if shapes != known:
            raise UserError(f"{name} differs from the first.\n  expected: {known}\n  found:    {shapes}")

    def _declare(self, shapes: dict[str, list[int]]) -> None:
        kinds = dict.fromkeys(shapes, "float32") | dict.fromkeys(self.views, self.storage) | _SCALARS
        for key, dtype in kinds.items():
            names = ["height", "width", "channels"] if key in self.views else None
            self.features[key] = {"dtype": dtype, "shape": shapes.get(key, [1]), "names": names}
        for key, what in ((STATE, "state"), (ACTION, "action")):
            for each in ("names", "units"):
                if texts := getattr(self.dimensions, f"{what}_{each}"):
                    if [len(texts)] != shapes[key]:
                        raise UserError(f"{key} has {shapes[key]} dimensions, but {each} {texts}.")
                    self.features[key][each] = list(texts)
        for view in self.views if self.storage == "video" else ():
            self._videos[view] = VideoWriter(self.folder, view, VIDEO_PATH, self.fps)
            self.features[view]["info"] = self._videos[view].describe(shapes[view])

    def _write_rows(self, columns: dict[str, np.ndarray]) -> int:
        """Writes one row group, in a new data file where the old one is full; gives the file's number."""
        arrays = [
            self._png_column(values) if key in self.views else _vectors(values)
            for key, values in columns.items()
        ]
        fields = [pa.field(key, array.type) for key, array in zip(columns, arrays, strict=True)]
        table = pa.table(arrays, schema=pa.schema(fields, metadata=_hugging_face(self.features)))
        if self._parquet is None or self._data_bytes + table.nbytes >= DATA_FILE_BYTES:
            if self._parquet is not None:
                self._parquet.close()
            self._data_file, self._data_bytes = self._data_file + 1, 0
            chunk, file = divmod(self._data_file, FILES_PER_CHUNK)
            path = self.folder / DATA_PATH.format(chunk_index=chunk, file_index=file)
            path.parent.mkdir(parents=True, exist_ok=True)
            # Only numbers gain from a dictionary; pyarrow's stub allows no list here.
            plain: Any = [key for key in self.features if key not in self.views]
            self._parquet = pq.ParquetWriter(path, table.schema, use_dictionary=plain, **PARQUET)
        self._parquet.write_table(table, row_group_size=table.num_rows)
        self._data_bytes += table.nbytes
        return self._data_file

    def _png_column(self, images: UInt8[np.ndarray, "t h w 3"]) -> pa.Array:
        # Pillow releases the GIL while it compresses, so two threads use two cores.
        encoded: Iterator[bytes] = self._pool.map(_png, images)
        items = [{"bytes": png, "path": f"frame-{i:06d}.png"} for i, png in enumerate(encoded)]
        return pa.array(items, type=pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def _png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _vectors(values: np.ndarray) -> pa.Array:
    """(t, k) to fixed_size_list<T>[k]; (t,) or (t, 1) to plain numbers."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    width = values.shape[1] if values.ndim > 1 else 1
    return flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)


def _hugging_face(features: dict[str, dict[str, Any]]) -> dict[bytes, bytes]:
    """The schema metadata by which the `datasets` library knows a column of pictures."""
    described: dict[str, Any] = {}
    for key, feature in features.items():
        value = {"dtype": feature["dtype"], "_type": "Value"}
        if feature["dtype"] == "image":
            described[key] = {"_type": "Image"}
        elif feature["dtype"] != "video":
            length = feature["shape"][0]
            listed = {"feature": value, "length": length, "_type": "List"}
            described[key] = value if length == 1 else listed
    return {b"huggingface": json.dumps({"info": {"features": described}}).encode()}


def _tasks_table(tasks: tuple[str, ...]) -> pa.Table:
    """The table of instructions, row i being task i, with the pandas metadata that makes `task` its index."""
    kinds = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    columns = [
        {"name": k, "field_name": k, "pandas_type": p, "numpy_type": n, "metadata": None}
        for k, (p, n) in kinds.items()
    ]
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.3.3"}
    schema = pa.schema(
        [("task_index", pa.int64()), ("task", pa.string())], metadata={"pandas": json.dumps(pandas)}
    )
    return pa.table([list(range(len(tasks))), list(tasks)], schema=schema)


def _count_values(values: np.ndarray) -> _Counted:
    """Of (t, k) or (t,) numbers, or of (t, h, w, c) pictures as bytes.

    Of pictures, max(100, n^0.75) frames are looked at, strided from 300 pixels.
    """
    if values.ndim != 4:
        return len(values), values.reshape(len(values), -1).astype(np.float64)
    wanted = min(len(values), max(_FEWEST_FRAMES, int(len(values) ** 0.75)))
    rows = np.linspace(0, len(values) - 1, wanted).round().astype(np.int64)
    stride = max(1, min(values.shape[1:3]) // 150) if max(values.shape[1:3]) >= _BIG_PICTURE else 1
    sample = values[rows, ::stride, ::stride]
    levels = [np.bincount(sample[..., c].ravel(), minlength=256) for c in range(values.shape[-1])]
    return wanted, np.stack(levels)


def _summarize(episodes: Sequence[_Counted]) -> dict[str, list[Any]]:
    """min, max, mean, std, count and quantiles as nested lists, in the shapes and order that LeRobot writes.

    Those of pictures are (C, 1, 1) in [0, 1]. LeRobot 0.6.1 stores the mean of the episodes' quantiles for a
    data set; these are the true quantiles of all values.
    """
    count, parts = sum(frames for frames, _ in episodes), [part for _, part in episodes]
    found: dict[str, Any] = {}
    if parts[0].dtype == np.float64:
        values, shape = np.concatenate(parts), (-1,)
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
