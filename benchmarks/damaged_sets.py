"""Sound LeRobot v3.0 sets, and ways to spoil them, by rule and seed.

`damage(line, number, folder, sound)` copies a sound set and spoils one thing in it. What must become of the
result is for `independent_reader.judge` to say.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from independent_reader import ACTION, DATA, EPISODES, MAX_TEXT, STATE
from PIL import Image

from tutti.data.formats.lerobot.video import priority_kept
from tutti.data.formats.lerobot.writer import EpisodeRecord, write_lerobot

FPS = 10
LENGTHS = (6, 8, 5, 7)
TEXTS = ("open the drawer", "push the red cube", 'say "你好" to the box')
TASK_OF = (0, 1, 0, 2)
VIEWS = ("observation.images.front", "observation.images.wrist")
EDGE = {"image": (16, 20), "video": (64, 64)}


def write_sound(folder: Path, storage: Literal["image", "video"]) -> None:
    """A sound set with PNG columns or videos; every picture differs from every other by far."""
    random = np.random.default_rng(7)
    height, width = EDGE[storage]
    episodes = []
    for number, length in enumerate(LENGTHS):
        images = {}
        for view in VIEWS:
            blocks = random.integers(0, 256, (length, 2, 2, 3), dtype=np.uint8)
            images[view] = blocks.repeat(height // 2, axis=1).repeat(width // 2, axis=2)
        numbers = random.normal(size=(length, 5)).astype(np.float32)
        episodes.append(
            EpisodeRecord(
                images=images,
                states=numbers[:, :3],
                actions=numbers[:, 1:],
                instruction=TEXTS[TASK_OF[number]],
            )
        )
    write_lerobot(folder, episodes, fps=FPS, views=VIEWS, robot_type="panda", storage=storage)


@dataclass
class Case:
    """A copy of a sound set that is about to be spoilt, the dice, and what is known about it beforehand."""

    folder: Path
    random: np.random.Generator
    storage: str
    outside: Path
    note: str = ""
    must_refuse: bool = False
    """True where `judge` cannot see it: code, paths that lead outside, bombs that it must not open itself."""
    reads: list[Path] = field(default_factory=list)
    """Files outside of the set that must not be opened."""

    def pick(self, *values: Any) -> Any:
        """One of them."""
        return values[int(self.random.integers(len(values)))]

    def info(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Changes info.json."""
        path = self.folder / "meta" / "info.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    def columns(self, name: str, **changes: Any) -> None:
        """Replaces columns of a table by arrays or lists; None drops one."""
        self.table(name, lambda table: _replaced(table, changes))

    def table(self, name: str, change: Callable[[pa.Table], pa.Table], **options: Any) -> None:
        """Rewrites a Parquet file."""
        pq.write_table(change(pq.read_table(self.folder / name)), self.folder / name, **options)

    def values(self, name: str, column: str) -> np.ndarray:
        """A column of numbers."""
        return pq.read_table(self.folder / name)[column].to_numpy().copy()

    def episode(self) -> tuple[int, int, int]:
        """An episode: number, first row, row after its last."""
        number = int(self.random.integers(len(LENGTHS)))
        start = sum(LENGTHS[:number])
        return number, start, start + LENGTHS[number]

    def view(self) -> str:
        """One of the two cameras."""
        return str(self.pick(*VIEWS))


def _replaced(table: pa.Table, changes: dict[str, Any]) -> pa.Table:
    for name, values in changes.items():
        place = table.column_names.index(name)
        table = table.remove_column(place)
        if values is not None:
            array = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
            table = table.add_column(place, name, array)
    return table


Mutation = Callable[[Case], None]


def _times(case: Case) -> None:
    """Timestamps of the rows."""
    times = case.values(DATA, "timestamp")
    _, start, end = case.episode()
    part = times[start:end]
    row = int(case.random.integers(start, end))
    case.note = kind = case.pick(
        "zero",
        "reversed",
        "swapped",
        "one",
        "late",
        "scaled",
        "nan",
        "inf",
        "huge",
        "negative",
        "jitter",
        "all",
    )
    if kind == "zero":
        times[start:end] = 0
    elif kind == "reversed":
        times[start:end] = part[::-1].copy()
    elif kind == "swapped":
        a, b = case.random.choice(np.arange(start, end), 2, replace=False)
        times[[a, b]] = times[[b, a]]
    elif kind == "one":
        times[row] += case.pick(-1, 1, 2) / FPS
    elif kind == "late":
        times[start:end] += case.pick(-0.5, 0.3, 1, 5) / FPS
    elif kind == "scaled":
        times[start:end] *= case.pick(0.5, 1.5, 2)
    elif kind in ("nan", "inf", "huge", "negative"):
        times[row] = {"nan": np.nan, "inf": np.inf, "huge": 1e300, "negative": -1.0}[kind]
    elif kind == "jitter":
        times += case.random.uniform(-0.1, 0.1, len(times)) / FPS
    else:
        times += case.pick(1.0, 100.0)
    case.columns(DATA, timestamp=pa.array(times, type=case.pick(pa.float32(), pa.float64())))


def _spans(case: Case) -> None:
    """Where each episode lies in its video."""
    key = case.view()
    start_name, end_name = f"videos/{key}/from_timestamp", f"videos/{key}/to_timestamp"
    starts, ends = case.values(EPISODES, start_name), case.values(EPISODES, end_name)
    number, *_ = case.episode()
    step = case.pick(-1, 1) / FPS
    case.note = kind = case.pick(
        "early", "both", "swapped", "zero", "end", "nan", "no end", "half", "past", "types"
    )
    changes: dict[str, Any] = {}
    if kind in ("early", "both"):
        starts[number] += step
        ends[number] += step if kind == "both" else 0
    elif kind == "swapped":
        a, b = case.random.choice(len(starts), 2, replace=False)
        starts[[a, b]] = starts[[b, a]]
    elif kind == "zero":
        starts[:] = 0
        if case.pick(0, 1):
            ends = np.asarray(LENGTHS) / FPS
    elif kind == "end":
        ends[number] += case.pick(-3, 2, 10) / FPS
    elif kind == "nan":
        starts[number] = case.pick(np.nan, np.inf, -np.inf, 1e300, -1.0)
    elif kind == "no end":
        changes[end_name] = None
        starts[number] += case.pick(0, step)
    elif kind == "half":
        starts[number] += 0.5 / FPS
    elif kind == "past":
        starts[number] = ends[number] = 1000.0
    else:
        changes[start_name] = pa.array([case.pick("0", "x", "")] * len(starts))
    changes = {start_name: starts, end_name: ends} | changes
    case.columns(EPISODES, **changes)


def _fps(case: Case) -> None:
    """The rate in info.json."""
    value = case.pick(
        *(5, 20, 9.99, 10.0001, 0.5, True, 1e18, 1e308, 1e-300, math.inf, math.nan, 0, -10, "10", None, [10]),
        *(11, 9, 10.5, 1, 30, 60, 100, {}, 10**300, 10.0, False, "", 1e-3),
    )
    case.note = repr(value)[:40]
    case.info(lambda info: info.update(fps=value))


def _fps_bare(case: Case) -> None:
    """The rate, without times in the rows."""
    _fps(case)
    case.columns(DATA, timestamp=None)
    if case.storage == "image" and case.note in ("5", "20", "11", "9", "1", "30", "60", "100", "9.99"):
        case.note += " (nothing contradicts it)"


def _texts(case: Case) -> None:
    """Instructions."""
    path = "meta/tasks.parquet"
    texts: list[Any] = list(TEXTS)
    place = int(case.random.integers(len(texts)))
    odd = (None, "", " ", "\t\n", 7, ["a"], "x" * (MAX_TEXT + 1), texts[place - 1], b"\xff\xfe", 1.5, True)
    case.note = kind = case.pick(
        "odd", "odd", "odd", "swapped", "equal", "longer", "index", "names", "episodes"
    )
    if kind == "odd":
        value = case.pick(*odd)
        case.note = repr(value)[:30]
        if isinstance(value, str) or value is None:
            texts[place] = value
            case.columns(path, task=pa.array(texts, type=pa.string()))
        elif isinstance(value, bytes):
            raw = pa.array(
                [text.encode() for text in texts[:place]] + [value] + [t.encode() for t in texts[place + 1 :]]
            )
            case.columns(path, task=raw.view(pa.string()))
        else:
            case.columns(path, task=pa.array([value] * len(texts)))
    elif kind == "swapped":
        a, b = case.random.choice(len(texts), 2, replace=False)
        texts[a], texts[b] = texts[b], texts[a]
        case.columns(path, task=texts)
    elif kind == "equal":
        case.columns(path, task=[texts[0]] * len(texts))
    elif kind == "longer":
        case.columns(path, task=[text + case.pick("", "!", " now") for text in texts])
    elif kind == "index":
        index = case.pick([0, 0, 2], [1, 0, 2], [1, 2, 3], [0, 1, None], ["0", "1", "2"], [0.0, 1.0, 2.0])
        case.columns(path, task_index=index)
    elif kind == "names":
        case.table(
            path, lambda table: table.rename_columns(["task_index", case.pick("text", "Task", "task_index")])
        )
    else:
        said: list[Any] = [[TEXTS[task]] for task in TASK_OF]
        said[place] = case.pick([], None, ["another"], [*TEXTS[:2]], [None])
        case.columns(EPISODES, tasks=pa.array(said, type=pa.list_(pa.string())))


def _task_index(case: Case) -> None:
    """Which row has which instruction."""
    tasks = case.values(DATA, "task_index")
    _, start, end = case.episode()
    case.note = kind = case.pick("zero", "reversed", "one", "episode", "range", "null", "type", "swap")
    if kind == "zero":
        tasks[:] = 0
    elif kind == "reversed":
        tasks = tasks[::-1].copy()
    elif kind == "one":
        tasks[start] = (tasks[start] + 1) % len(TEXTS)
    elif kind == "episode":
        tasks[start:end] = (tasks[start:end] + 1) % len(TEXTS)
    elif kind == "range":
        tasks[start] = case.pick(-1, len(TEXTS), 2**40)
    elif kind == "swap":
        tasks = np.where(tasks == 0, 1, np.where(tasks == 1, 0, tasks))
    values: Any = tasks.tolist()
    if kind == "null":
        values[start] = None
    if kind == "type":
        values = [case.pick(str, float)(value) for value in values[:1]] * len(values)
    case.columns(DATA, task_index=pa.array(values))


def _rows(case: Case) -> None:
    """The order of rows."""
    order = np.arange(sum(LENGTHS))
    _, start, end = case.episode()
    case.note = kind = case.pick("reversed", "swapped", "rolled", "shuffled", "twice", "episodes")
    if kind == "reversed":
        order[start:end] = order[start:end][::-1].copy()
    elif kind == "swapped":
        a, b = case.random.choice(np.arange(start, end), 2, replace=False)
        order[[a, b]] = order[[b, a]]
    elif kind == "rolled":
        order[start:end] = np.roll(order[start:end], 1)
    elif kind == "shuffled":
        case.random.shuffle(order)
    elif kind == "twice":
        order[start + 1] = order[start]
    else:
        order = np.concatenate([order[end:], order[:end]])
    dropped = case.pick(("index",), (), ("index", "timestamp"), ("timestamp",))
    case.note += f" without {', '.join(dropped)}"
    case.table(DATA, lambda table: table.take(pa.array(order)).drop_columns(list(dropped)))


def _borders(case: Case) -> None:
    """Where episodes begin and end."""
    number = int(case.random.integers(len(LENGTHS) - 1))
    first, last = (case.values(EPISODES, f"dataset_{end}_index") for end in ("from", "to"))
    length = case.values(EPISODES, "length")
    step = case.pick(-1, 1, 2)
    first[number + 1] += step
    last[number] += step
    if case.pick(0, 1):
        length[number] += step
        length[number + 1] -= step
    case.columns(EPISODES, dataset_from_index=first, dataset_to_index=last, length=length)
    if case.pick(0, 1, 1):
        of = np.repeat(np.arange(len(LENGTHS)), last - first)
        case.columns(DATA, episode_index=of)
    if case.pick(0, 1):
        case.table(DATA, lambda table: table.drop_columns(["index"]))


def _counts(case: Case) -> None:
    """Tables that do not agree with info.json or with each other."""
    case.note = kind = case.pick(
        "totals", "frame_index", "index", "episode_index", "length", "files", "columns"
    )
    row = int(case.random.integers(sum(LENGTHS)))
    if kind == "totals":
        key = case.pick("total_episodes", "total_frames", "total_tasks")
        value = case.pick(0, -1, 1, 10**9, 2**63, None, "4", 4.0, True)
        case.note = f"{key} = {value}"
        case.info(lambda info: info.update({key: value}))
    elif kind in ("frame_index", "index", "episode_index"):
        values = case.values(DATA, kind)
        values[row] += case.pick(-1, 1, 7)
        case.columns(DATA, **{kind: values})
    elif kind == "length":
        values = case.values(EPISODES, "length")
        values[0] += case.pick(-1, 1)
        case.columns(EPISODES, length=values)
    elif kind == "files":
        name = case.pick("data/chunk_index", "data/file_index")
        case.columns(EPISODES, **{name: [case.pick(1, -1, 10**12)] * len(LENGTHS)})
    else:
        name = case.pick("episode_index", "task_index", STATE, ACTION, "frame_index", "index", "timestamp")
        case.table(DATA, lambda table: table.drop_columns([name]))


def _flipped(case: Case) -> None:
    """Flipped bits, cut ends and lost files."""
    name = case.pick(DATA, DATA, EPISODES, "meta/tasks.parquet", "meta/info.json")
    path = case.folder / name
    content = bytearray(path.read_bytes())
    case.note = kind = case.pick("bit", "bit", "bit", "bit", "cut", "empty", "zeros", "lost", "twice")
    if kind == "bit":
        content[int(case.random.integers(len(content)))] ^= 1 << int(case.random.integers(8))
    elif kind == "cut":
        content = content[: int(case.random.integers(len(content)))]
    elif kind == "empty":
        content = bytearray()
    elif kind == "zeros":
        place = int(case.random.integers(len(content)))
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    elif kind == "twice":
        content = content * 2
    path.unlink()
    case.note += f" {name}"
    if kind != "lost":
        path.write_bytes(content)


def _numbers_wrong(case: Case) -> None:
    """Numbers that are none."""
    key = case.pick(STATE, ACTION)
    rows: list[Any] = pq.read_table(case.folder / DATA)[key].to_pylist()
    row = int(case.random.integers(len(rows)))
    value = case.pick(math.nan, math.inf, -math.inf, 1e300, None, "short", "long", "empty", "null", "1e39")
    case.note = f"{key}: {value}"
    if isinstance(value, str) and value != "1e39":
        rows[row] = {"short": rows[row][1:], "long": rows[row] + [0.0], "empty": [], "null": None}[value]
    else:
        rows[row][0] = 1e39 if value == "1e39" else value
    case.columns(DATA, **{key: pa.array(rows, type=pa.list_(pa.float64()))})


def deep_png(levels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write; it reads it as 8-bit RGB."""
    rows = np.repeat(levels[..., None], 3, axis=-1).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    height, width = levels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")):
        out += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return out


def _picture(case: Case) -> None:
    """Pictures that are not 8-bit RGB in PNG, JPEG or WEBP."""
    key = case.view()
    cells: list[Any] = pq.read_table(case.folder / DATA)[key].to_pylist()
    row = int(case.random.integers(len(cells)))
    height, width = EDGE["image"]
    levels = case.random.integers(0, 2**16, (height, width)).astype(np.uint16)
    small = (levels >> 8).astype(np.uint8)
    rgb = Image.fromarray(np.stack([small] * 3, axis=-1))
    pictures: dict[str, tuple[Image.Image, str]] = {
        "I;16": (Image.fromarray(levels), "PNG"),
        "float": (Image.fromarray(levels.astype(np.float32)), "TIFF"),
        "RGBA": (rgb.convert("RGBA"), "PNG"),
        "LA": (Image.fromarray(small).convert("LA"), "PNG"),
        "P": (rgb.convert("P"), "PNG"),
        "L": (Image.fromarray(small), "PNG"),
        "1": (Image.fromarray(small).convert("1"), "PNG"),
        "CMYK": (rgb.convert("CMYK"), "JPEG"),
        "grey jpeg": (Image.fromarray(small), "JPEG"),
        "RGBA webp": (rgb.convert("RGBA"), "WEBP"),
        **{name: (rgb, name) for name in ("GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "JPEG", "WEBP", "PNG")},
        "16 bit RGB": (rgb, "PNG"),
        "turned": (rgb.transpose(Image.Transpose.ROTATE_90), "PNG"),
        "small": (rgb.resize((width // 2, height // 2)), "PNG"),
    }
    raw = {
        **{"eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 16\n%%EndComments\nshowpage\n"},
        **{"empty": b"", "text": b"not a picture", "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>"},
        **{"cut": cells[row]["bytes"][: len(cells[row]["bytes"]) // 2], "null": None, "flipped": b""},
    }
    case.note = kind = case.pick(*pictures, *raw)
    if kind in pictures:
        image, form = pictures[kind]
        buffer = io.BytesIO()
        image.save(buffer, form)
        content: bytes | None = deep_png(levels) if kind == "16 bit RGB" else buffer.getvalue()
    elif kind == "flipped":
        spoilt = bytearray(cells[row]["bytes"])
        spoilt[int(case.random.integers(len(spoilt)))] ^= 1 << int(case.random.integers(8))
        content = bytes(spoilt)
    else:
        content = raw[kind]
    cells[row] = {"bytes": content, "path": cells[row]["path"]}
    kind_of = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    case.columns(DATA, **{key: pa.array(cells, type=kind_of)})


def _picture_column(case: Case) -> None:
    """Columns of pictures of another type."""
    key = case.view()
    count = sum(LENGTHS)
    case.note = kind = case.pick("text", "numbers", "lists", "none", "null", "paths")
    columns: dict[str, Any] = {
        "text": pa.array(["x"] * count),
        "numbers": pa.array([1] * count),
        "lists": pa.array([[1, 2]] * count),
        "null": pa.array([None] * count, type=pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "paths": pa.array([{"bytes": None, "path": "/etc/hostname"}] * count),
        "none": None,
    }
    case.columns(DATA, **{key: columns[kind]})


def _outside(case: Case) -> None:
    """Paths that lead out of the set."""
    case.must_refuse = True
    out = case.outside
    out.mkdir()
    key = "video_path" if case.storage == "video" and case.pick(0, 1) else "data_path"
    up = os.path.relpath(out, case.folder)
    inside = DATA if key == "data_path" else f"videos/{VIEWS[0]}/chunk-000/file-000.mp4"
    target = out / "target"
    shutil.copy(case.folder / inside, target)
    os.utime(target, (0, target.stat().st_mtime))
    case.reads.append(target)
    case.note = kind = case.pick("up", "absolute", "camera", "dots", "format")
    if kind == "camera" and case.storage == "video":
        name = f"observation.images.{'../' * 6}{target.relative_to('/')}"
        case.info(lambda info: info["features"].update({name: info["features"].pop(VIEWS[0])}))
    elif kind == "dots":
        case.info(lambda info: info.update({key: f"data/../{up}/target"}))
    elif kind == "format":
        case.info(lambda info: info.update({key: "{chunk_index.__class__.__mro__}"}))
    else:
        case.info(lambda info: info.update({key: str(target) if kind == "absolute" else f"{up}/target"}))


def _pattern(case: Case) -> None:
    """Path patterns."""
    key = "video_path" if case.storage == "video" and case.pick(0, 1) else "data_path"
    value = case.pick(
        *(
            "{chunk_index:0999999999d}",
            "{file_index:>1500000000}",
            "{x.foo}",
            "{x[0]}",
            "x" * 5000,
            "",
            None,
            7,
        ),
        *(
            "{",
            "{}",
            "{0}",
            "{chunk_index!r:>900000000}",
            "data/chunk-{chunk_index}/file-{file_index}.parquet",
        ),
        *(
            "data/\x00.parquet",
            "data/chunk-{chunk_index:z}/f",
            ["data"],
            "{chunk_index[0]}",
            "~/x",
            "$HOME/x",
        ),
    )
    case.note = f"{key} = {str(value)[:40]}"
    case.info(lambda info: info.update({key: value}))


def _sizes(case: Case) -> None:
    """Shapes in info.json."""
    key = case.pick(STATE, ACTION, *VIEWS)
    value = case.pick(
        *(
            [2**31],
            [10**12],
            [0],
            [-1],
            [65535, 65535, 3],
            [10**6, 10**6, 3],
            [-1, 16, 3],
            [16, 20, 4],
            [16, 20],
        ),
        *(
            [10**10, 2, 3],
            [True],
            [3.0],
            "3",
            None,
            [],
            [3, 1],
            [16, 20, 3, 1],
            [[3]],
            ["3"],
            [4],
            [2],
            [20, 16, 3],
        ),
        *([1, 16, 20], [96, 96, 1], [2**63], [3, 16, 20]),
    )
    case.note = f"{key}: {value}"
    case.info(lambda info: info["features"][key].update(shape=value))


def _bomb(case: Case) -> None:
    """Small files that become large."""
    case.note = kind = case.pick("text", "png", "png large", "list", "frames", "info", "picture")
    case.must_refuse = True
    key = case.view()
    if kind == "text":
        size = case.pick(10**6, 5 * 10**7, 3 * 10**8)
        texts = [*TEXTS[:-1], "x" * size]
        case.table("meta/tasks.parquet", lambda table: _replaced(table, {"task": texts}), compression="zstd")
    elif kind in ("png", "png large") and case.storage == "image":
        edge = 13_000 if kind == "png" else 50_000
        buffer = io.BytesIO()
        Image.new("1", (edge, edge)).save(buffer, "PNG")
        cells = pq.read_table(case.folder / DATA)[key].to_pylist()
        cells[3] = {"bytes": buffer.getvalue(), "path": "x"}
        case.columns(DATA, **{key: cells})
    elif kind == "list":
        count = sum(LENGTHS)
        wide = np.zeros(count * case.pick(10**6, 5 * 10**6), dtype=np.float32)
        column = pa.FixedSizeListArray.from_arrays(pa.array(wide), len(wide) // count)
        case.table(DATA, lambda table: _replaced(table, {STATE: column}), compression="zstd")
        width = len(wide) // count
        case.info(lambda info: info["features"][STATE].update(shape=[width]))
    elif kind == "frames":
        case.info(lambda info: info.update(total_frames=10**9))
        last = case.values(EPISODES, "dataset_to_index")
        length = case.values(EPISODES, "length")
        length[-1] += 10**9 - last[-1]
        last[-1] = 10**9
        case.columns(EPISODES, dataset_to_index=last, length=length)
    elif kind == "info":
        text = case.pick(
            "[" * 10**6, '{"fps": ' + "9" * 10**6 + "}", '{"a": "' + "x" * 10**8 + '"}', "[1," * 9999
        )
        (case.folder / "meta" / "info.json").write_text(text)
    else:
        cells = [{"bytes": bytes(case.pick(10**7, 10**8)), "path": "x"}] * 2
        rest = pq.read_table(case.folder / DATA)[key].to_pylist()[2:] if case.storage == "image" else None
        if rest is None:
            case.info(lambda info: info.update(total_frames=10**9))
        else:
            case.table(DATA, lambda table: _replaced(table, {key: cells + rest}), compression="zstd")


def _devices(case: Case) -> None:
    """Files that are no files."""
    case.must_refuse = True
    name = case.pick(DATA, EPISODES, "meta/tasks.parquet", "meta/info.json")
    path = case.folder / name
    path.unlink()
    case.note = kind = case.pick("fifo", "zero", "folder", "loop", "sparse", "dangling")
    case.note += f" {name}"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(50 * 2**30)
    else:
        path.symlink_to({"zero": "/dev/zero", "loop": path.name, "dangling": "nowhere"}[kind])


def _features(case: Case) -> None:
    """Features of odd form."""
    odd = (None, 7, [], "x", {}, {"dtype": "image"}, {"shape": [3]}, {"dtype": 7, "shape": [3]}, True)
    case.note = kind = case.pick(
        "odd", "name", "names", "dtype", "whole", "version", "robot", "twice", "deep", "extra"
    )
    key = case.pick(STATE, ACTION, *VIEWS)
    path = case.folder / "meta" / "info.json"
    if kind == "odd":
        value = case.pick(*odd)
        case.info(lambda info: info["features"].update({key: value}))
    elif kind == "name":
        name = case.pick(
            "observation.images.a/b", "observation.images...", "", "observation.images.\x00", "x" * 10**5
        )
        case.info(lambda info: info["features"].update({name: info["features"].pop(VIEWS[0])}))
    elif kind == "names":
        value = case.pick(7, "height", ["a"], {"height": 1}, [["height"]], None)
        case.info(lambda info: info["features"][key].update(names=value))
    elif kind == "dtype":
        value = case.pick("float64", "int64", "string", "object", "video", "image", "", None, [])
        case.info(lambda info: info["features"][key].update(dtype=value))
    elif kind == "whole":
        path.write_text(json.dumps(case.pick([], 7, "x", None, {}, {"features": []}, [[]])))
    elif kind == "version":
        value = case.pick(None, 3, "v3", "v2.1", "v2.0", "v1.6", "v4.0", "", "v30", [], "3.0", "v3.1")
        case.info(lambda info: info.update(codebase_version=value))
    elif kind == "robot":
        value = case.pick(7, [], {}, "x" * 10**5, True, "a\nb")
        case.info(lambda info: info.update(robot_type=value))
    elif kind == "twice":
        text = path.read_text()
        path.write_text(
            text[:-1] + f', "{case.pick("fps", "total_frames", "features")}": {case.pick("7", "{}")}}}'
        )
    elif kind == "deep":
        path.write_text(path.read_text()[:-1] + ', "x": ' + "[" * 3000 + "]" * 3000 + "}")
    else:
        case.info(lambda info: info.update({case.pick("note", "_", "splits"): case.pick(1, "x", [1], {})}))


def _videos(case: Case) -> None:
    """Files in place of a video."""
    path = case.folder / "videos" / case.view() / "chunk-000" / "file-000.mp4"
    content = path.read_bytes()
    texts = {
        "hls": b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n",
        "concat": b"ffconcat version 1.0\nfile /etc/hostname\n",
        "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
        "empty": b"",
        "text": b"no video",
    }
    case.note = kind = case.pick(*texts, "cut", "lost", "other", "bit", "twice")
    path.unlink()
    if kind == "other":
        with priority_kept(), av.open(str(path), "w", format="mp4") as container:
            stream = container.add_stream("libsvtav1", rate=FPS)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for _ in range(case.pick(1, 5)):
                for packet in stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))):
                    container.mux(packet)
            container.mux(stream.encode())
    elif kind == "bit":
        spoilt = bytearray(content)
        spoilt[int(case.random.integers(len(spoilt)))] ^= 1 << int(case.random.integers(8))
        path.write_bytes(spoilt)
    elif kind != "lost":
        pieces = {"cut": content[: int(case.random.integers(len(content)))], "twice": content * 2}
        path.write_bytes(texts.get(kind, pieces.get(kind, b"")))


LINES: dict[str, tuple[tuple[str, Mutation], ...]] = {
    "times": (("image", _times), ("video", _times), ("video", _spans)),
    "fps": (("image", _fps), ("video", _fps), ("image", _fps_bare)),
    "texts": (("image", _texts), ("image", _task_index)),
    "rows": (("image", _rows), ("image", _borders), ("image", _counts)),
    "bits": (("image", _flipped), ("image", _numbers_wrong), ("video", _flipped)),
    "pictures": (("image", _picture),),
    "outside": (("image", _outside), ("video", _outside), ("video", _videos)),
    "bombs": (("image", _bomb), ("image", _sizes), ("image", _pattern), ("video", _sizes)),
    "devices": (("image", _devices),),
    "forms": (("image", _features), ("video", _features), ("image", _picture_column)),
}


def damage(line: str, number: int, folder: Path, sound: dict[str, Path]) -> Case:
    """Spoils a copy of `sound[storage]`; the same line and number give the same bytes."""
    mutations = LINES[line]
    storage, mutation = mutations[number % len(mutations)]
    shutil.copytree(sound[storage], folder)
    random = np.random.default_rng([list(LINES).index(line), number])
    case = Case(folder, random, storage, folder.with_name(folder.name + "-outside"))
    mutation(case)
    case.note = f"{mutation.__name__.strip('_')}: {case.note}"
    return case
