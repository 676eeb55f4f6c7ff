"""Writes a LeRobotDataset v3.0 folder: pictures as PNG columns or as videos; atomic and deterministic."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt8

from tutti.data.episodes import Progress
from tutti.data.formats.lerobot import ACTION, STATE
from tutti.data.formats.lerobot.pieces import (
    PARQUET,
    Counted,
    EpisodeRecord,
    Piece,
    Storage,
    count_values,
    load_piece,
    prepare,
    shapes_of,
    summarize,
    vector_column,
)
from tutti.data.formats.lerobot.video import FILE_BYTES, FILES_PER_CHUNK, Span, VideoWriter
from tutti.errors import UserError
from tutti.storage.files import explain_full_disk, megabytes, partial_path, write_folder
from tutti.types import UNNAMED, Dimensions

DATA_FILE_BYTES = 100 * 2**20
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"

_SCALARS = {"timestamp": "float32"} | dict.fromkeys(
    ("frame_index", "episode_index", "index", "task_index"), "int64"
)


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
            DatasetWriter(
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


class DatasetWriter:
    """The open files of a data set being written; `add` or `join` each episode, then `finish`."""

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
        self.counted: dict[str, list[Counted]] = {}
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
        """Appends one episode, the pictures encoded here."""
        name = f"Episode {len(self.rows)} ({episode.instruction!r})"
        if set(episode.images) != set(self.views):
            raise UserError(f"{name}: expected the views {self.views}, found {tuple(episode.images)}.")
        if tuple(episode.images) != self.views:
            episode = replace(episode, images={view: episode.images[view] for view in self.views})
        spans: dict[str, Span] = {}

        def film(view: str) -> Callable[[Iterator[UInt8[np.ndarray, "h w 3"]]], None]:
            def write(frames: Iterator[UInt8[np.ndarray, "h w 3"]]) -> None:
                spans[view] = self._videos[view].add(frames)

            return write

        # Before a picture is encoded: an encoder takes one size only.
        self._check(name, shapes_of(episode))
        self._append(prepare(episode, name, self._pool, {view: film(view) for view in self._videos}), spans)

    def join(self, folder: Path) -> None:
        """Appends one episode that `save_piece` wrote into `folder`; its videos are not encoded again."""
        piece = load_piece(folder)
        self._check(f"Episode {len(self.rows)} ({folder})", piece.shapes)
        self._append(piece, {v: video.join(folder / f"{v}.mp4") for v, video in self._videos.items()})

    def _append(self, piece: Piece, spans: Mapping[str, Span]) -> None:
        """To the data file, the statistics and the episode table."""
        length, number = piece.length, len(self.rows)
        begins = [frame for frame, _ in piece.texts]
        tasks = [self.tasks.setdefault(text, len(self.tasks)) for _, text in piece.texts]
        frame = np.arange(length, dtype=np.int64)
        places = {"timestamp": (frame / self.fps).astype(np.float32), "frame_index": frame}
        places |= {"episode_index": np.full(length, number), "index": self.num_frames + frame}
        places["task_index"] = np.repeat(tasks, np.diff([*begins, length]))
        said = list(dict.fromkeys(text for _, text in piece.texts))
        row: dict[str, Any] = {"episode_index": number, "tasks": said, "length": length}
        row["dataset_from_index"] = self.num_frames
        row["dataset_to_index"] = self.num_frames = self.num_frames + length
        for view, span in spans.items():
            names = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
            row |= {f"videos/{view}/{name}": value for name, value in zip(names, span, strict=True)}
        file = self._write_rows(piece.columns | {key: vector_column(one) for key, one in places.items()})
        row |= {"data/chunk_index": file // FILES_PER_CHUNK, "data/file_index": file % FILES_PER_CHUNK}
        counts = piece.counted | {key: count_values(one) for key, one in places.items()}
        for key in (*piece.shapes, *places):
            self.counted.setdefault(key, []).append(counts[key])
            row |= {f"stats/{key}/{name}": value for name, value in summarize([counts[key]]).items()}
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
        stats = {key: summarize(counted) for key, counted in self.counted.items()}
        for name, value in (("stats", stats), ("info", info)):
            (meta / f"{name}.json").write_text(json.dumps(value, indent=4), encoding="utf-8")

    def _check(self, name: str, shapes: dict[str, list[int]]) -> None:
        """Fixes the features by the first episode and holds every later one to them."""
        if not self.features:
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
                if key in shapes and (texts := getattr(self.dimensions, f"{what}_{each}")):
                    if [len(texts)] != shapes[key]:
                        raise UserError(f"{key} has {shapes[key]} dimensions, but {each} {texts}.")
                    self.features[key][each] = list(texts)
        for view in self.views if self.storage == "video" else ():
            self._videos[view] = VideoWriter(self.folder, view, VIDEO_PATH, self.fps)
            self.features[view]["info"] = self._videos[view].describe(shapes[view])

    def _write_rows(self, columns: dict[str, pa.Array]) -> int:
        """Writes one row group, in a new data file where the old one is full; gives the file's number."""
        ordered = {key: columns[key] for key in self.features if key in columns}
        fields = [pa.field(key, array.type) for key, array in ordered.items()]
        schema = pa.schema(fields, metadata=_hugging_face(self.features))
        table = pa.table([*ordered.values()], schema=schema)
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
