"""RLDS sets that are damaged, cut or hostile: one message for the user, no other error, never much memory."""

from __future__ import annotations

import copy
import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rlds_sets as sets

from tutti.data.formats.rlds.reader import RldsReader
from tutti.errors import UserError

COUNTS = (3, 2, 4)
STEPS = {
    "observation/image": sets.image(4, 4, 3),
    "observation/any": sets.image(-1, -1, 3),
    "observation/pixels": sets.tensor(2, 2, 3, dtype="uint8"),
    "observation/state": sets.tensor(3),
    "observation/packed": sets.tensor(2, encoding="zlib"),
    "observation/instruction": sets.tensor(8, dtype="int32"),
    "language_instruction": sets.TEXT,
    "action": sets.tensor(2),
    "label": {"pythonClassName": "x.ClassLabel", "classLabel": {"numClasses": "2"}},
}
WRONG: tuple[Any, ...] = (None, -1, 10**30, "", "x", [], {}, [[]], True, {"a": 1}, "9" * 99, ["-7"], 0.5)


def values_of(count: int) -> dict[str, Any]:
    picture = sets.encoded(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    return {
        "observation/image": [picture] * count,
        "observation/any": [picture] * count,
        "observation/pixels": np.arange(count * 12),
        "observation/state": np.arange(count * 3, dtype=np.float32),
        "observation/packed": [zlib.compress(np.ones(2, np.float32).tobytes())] * count,
        "observation/instruction": np.tile([97, 98, 0, 0, 0, 0, 0, 0], (count, 1)),
        "language_instruction": [b"open it"] * count,
        "action": np.ones((count, 2), np.float32),
        "label": np.arange(count) % 2,
    }


def record(count: int, **changed: Any) -> bytes:
    values = {key: one for key, one in (values_of(count) | changed).items() if one is not ...}
    return sets.example(sets.flags_of(count) | {f"steps/{key}": one for key, one in values.items()})


def write(folder: Path, *records: bytes, features: Any = None, **info: Any) -> Path:
    many = records or [record(count) for count in COUNTS]
    sets.write_set(folder, "mine", features or sets.episodes_of(STEPS), {"train": [many]}, **info)
    (folder / "steps-label.labels.txt").write_text("a\nb\n")
    return folder


def shard(folder: Path) -> Path:
    return folder / "mine-train.tfrecord-00000-of-00001"


def read(folder: Path) -> str:
    """Reads all of a set: "" if it could be read, else the message for the user."""
    try:
        reader = RldsReader(folder)
        reader.roles()
        for episode, steps in enumerate(reader.lengths.tolist()):
            for key, feature in reader.features.items():
                if feature.kind == "picture":
                    reader.pictures(key, episode, np.arange(steps))
                elif feature.kind == "vector":
                    assert reader.numbers(key, episode).shape == (steps, *feature.shape)
                else:
                    reader.texts(key, episode)
    except UserError as error:
        assert "cure:" in str(error).lower(), error
        return str(error)
    return ""


def test_the_set_itself_is_read(tmp_path: Path) -> None:
    assert read(write(tmp_path)) == ""


def test_each_flipped_byte_of_a_file_is_noticed(tmp_path: Path) -> None:
    content = shard(write(tmp_path)).read_bytes()
    for place in range(0, len(content), len(content) // 60):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        shard(tmp_path).write_bytes(damaged)
        assert shard(tmp_path).name in read(tmp_path), place


def test_each_cut_of_a_file_is_noticed(tmp_path: Path) -> None:
    content = shard(write(tmp_path)).read_bytes()
    for length in (*range(0, 20), *range(20, len(content), len(content) // 30)):
        shard(tmp_path).write_bytes(content[:length])
        assert read(tmp_path), length
    shard(tmp_path).write_bytes(content + b"\0")
    assert "cut off" in read(tmp_path)


def test_damage_behind_right_checksums_is_refused_or_read(tmp_path: Path) -> None:
    draw, content = random.Random(0), record(3)
    refused = 0
    for _ in range(80):
        damaged = bytearray(content)
        for place in draw.sample(range(len(content)), 2):
            damaged[place] = draw.randrange(256)
        refused += bool(read(write(tmp_path, bytes(damaged))))
    assert refused > 20


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from nodes(inner, (*path, key))


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
def test_wrong_values_in_the_descriptions_are_refused_or_read(tmp_path: Path, name: str) -> None:
    good = json.loads((write(tmp_path) / name).read_text())
    draw = random.Random(1)
    places = [path for path in nodes(good) if path]
    refused = 0
    for path in draw.choices(places, k=90):
        damaged = copy.deepcopy(good)
        inner = damaged
        for key in path[:-1]:
            inner = inner[key]
        if draw.random() < 0.2:
            del inner[path[-1]]
        else:
            inner[path[-1]] = draw.choice(WRONG)
        (tmp_path / name).write_text(json.dumps(damaged))
        refused += bool(read(tmp_path))
    assert refused > 30


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "1", '{"a": 1, "a": 2}', "[" * 9999, "\x00", '{"steps": {}}']
)
def test_descriptions_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    for name in ("features.json", "dataset_info.json"):
        (write(tmp_path) / name).write_text(text)
        assert name in read(tmp_path)


BOMB = zlib.compress(bytes(10**7))
PNG = sets.encoded(np.zeros((4, 4, 3), np.uint8))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"action": ...}, "steps/action is missing"),
        ({"action": None}, "steps/action is missing"),
        ({"action": np.ones((3, 3), np.float32)}, "steps/action has 9 values"),
        ({"action": np.ones((3, 2), np.int64)}, "steps/action holds values of another type"),
        ({"action": np.ones((3, 10**5), np.float32)}, "steps/action has too many values"),
        ({"label": np.array([0, 1, 2])}, "label is no text"),
        ({"language_instruction": [b"a", b"\xff", b""]}, "language_instruction is no text"),
        ({"language_instruction": [b"a"]}, "steps/language_instruction has 1 values"),
        ({"observation/instruction": np.full((3, 8), 2**40)}, "observation/instruction is no text"),
        ({"observation/instruction": np.full((3, 8), 0xD800)}, "observation/instruction is no text"),
        ({"observation/packed": [BOMB] * 3}, "observation/packed has 9 bytes"),
        ({"observation/packed": [b"??"] * 3}, "observation/packed is damaged"),
        ({"observation/packed": [BOMB[:20]] * 3}, "observation/packed has"),
        ({"observation/pixels": np.full(36, 300)}, "pixels beyond 8 bits"),
        ({"observation/image": [b"", PNG, PNG]}, "observation/image of step 0 cannot be read"),
        ({"observation/image": [PNG, PNG[:45], PNG]}, "observation/image of step 1 cannot be read"),
        ({"observation/image": [PNG, PNG, sets.encoded(np.zeros((5, 4, 3), np.uint8))]}, "5 x 4 pixels"),
        ({"observation/image": [PNG, PNG, sets.encoded(np.zeros((4, 4), np.uint8))]}, "it is L"),
        ({"observation/any": [b"?", PNG, PNG]}, "observation/any of step 0 cannot be read"),
        ({"is_first": np.zeros(0, np.int64)}, "0 steps"),
    ],
)
def test_a_feature_that_is_not_as_described_is_named(
    tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    message = read(write(tmp_path, record(3, **changed)))
    if "is_first" in changed:  # an episode without steps whose features have some
        assert "expected: " in message and "0, by steps" in message
        return
    assert words in message and shard(tmp_path).name in message and "episode 0" in message


def test_an_index_feature_of_another_kind_is_refused(tmp_path: Path) -> None:
    for flags in ([b"x"], np.ones(3, np.float32), ...):
        values = {"steps/is_first": flags} if flags is not ... else {}
        message = read(write(tmp_path, sets.example(values)))
        assert "steps/is_first" in message and "record at byte 0" in message


def test_a_set_without_episodes_is_refused(tmp_path: Path) -> None:
    write(tmp_path, splits=[{"name": "train", "shardLengths": ["0"]}])
    shard(tmp_path).write_bytes(b"")
    assert "has no episode" in read(tmp_path)
