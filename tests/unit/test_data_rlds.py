"""RLDS sets: what is read equals the arrays that they were made of, in every encoding and layout."""

from __future__ import annotations

import copy
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rlds_sets as sets
import rlds_speed
from rlds_sets import TEXT, Values

from tutti.data.formats.interface import Feature
from tutti.data.formats.rlds import index
from tutti.data.formats.rlds.reader import RldsReader
from tutti.data.sources import SourceConfig
from tutti.errors import UserError

TINY = Path(__file__).resolve().parents[1] / "data" / "formats" / "rlds" / "tiny_rlds"
ORDER = (1, 4, 2, 3, 0, 5, 6)
"""The episodes of the fixture in the order of its files: train, then val."""
TASKS = (
    "open the drawer",
    "close the drawer",
    "pick up the red block",
    'Put the cup, carefully, on the "plate" — 盘子',
)


def picture(height: int, width: int, episode: int, step: int, camera: int) -> np.ndarray:
    """A picture of the fixture."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    red = 128 + 100 * np.sin(x / 9 + step * 0.35 + camera)
    green = 128 + 100 * np.cos(y / 7 - step * 0.2 + episode)
    made = np.stack([red, green, 60 + 40 * camera + 0 * x], -1)
    bar, side = max(8, width // 8), height // 5
    for number, value in enumerate(((episode * 40) % 256, (step * 12) % 256, 90 * camera + 30)):
        made[: height // 4, number * bar : (number + 1) * bar] = value
    top, left = int(height * 0.6), int((step * 3) % (width - side))
    made[top : top + side, left : left + side] = (250, 20, 20)
    return np.clip(made, 0, 255).astype(np.uint8)


def numbers_of(episode: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The states and actions of an episode of the fixture."""
    generator, times = np.random.default_rng([0, episode]), np.arange(count)[:, None] / count
    waves = np.sin(2 * np.pi * (times * (1 + np.arange(8)) / 4 + generator.random(8)))
    states = waves.astype(np.float32) + episode
    actions = np.diff(states[:, :7], axis=0, append=states[-1:, :7]).astype(np.float32)
    actions[:, -1] = np.where(np.arange(count) > count // 2, 1.0, -1.0)
    return states, actions


@pytest.fixture(scope="module")
def tiny() -> RldsReader:
    return RldsReader(TINY, split="all")


def test_the_fixture_of_tfds_has_its_features_lengths_and_remarks(tiny: RldsReader) -> None:
    assert tiny.lengths.tolist() == [6 + episode for episode in ORDER]
    assert (tiny.fps, tiny.embodiment) == (None, "unknown")
    assert {key: feature.shape for key, feature in tiny.features.items() if feature.kind == "picture"} == {
        "observation/image": (48, 64),
        "observation/wrist_image": (32, 32),
    }
    assert {key for key, feature in tiny.features.items() if feature.kind == "text"} == {
        "episode_metadata/file_path",
        "label",
        "observation/natural_language_instruction",
    }
    said = "\n".join(tiny.remarks)
    for key in ("depth", "depth_float", "tokens"):
        assert f"observation/{key}" not in tiny.features
        assert f"observation/{key}:" in said
    assert "episode_metadata/boxes/xy" in said


@pytest.mark.parametrize("place", range(len(ORDER)))
def test_every_value_of_the_fixture_is_the_one_it_was_made_of(tiny: RldsReader, place: int) -> None:
    episode = ORDER[place]
    count = 6 + episode
    steps = np.arange(count)
    states, actions = numbers_of(episode, count)
    last = (steps == count - 1).astype(np.float32)[:, None]
    flat = np.arange(12, dtype=np.float32)
    expected = {
        "observation/state": states,
        "observation/joint64": np.stack([np.full(count, np.pi), np.full(count, episode), steps], 1),
        "observation/zipped": flat + steps[:, None],
        "observation/mask": np.tile([0, 1, 127, 128, 255], (count, 1)),
        "action/world_vector": actions[:, :3],
        "action/rotation_delta": actions[:, 3:6],
        "action/gripper_closedness_action": actions[:, 6:],
        "action/terminate_episode": last * [0, 1, 0],
        "reward": last,
        "discount": np.ones((count, 1)),
        "index": -steps[:, None],
        "is_first": (steps == 0)[:, None],
        "is_last": last,
        "is_terminal": last,
        "episode_metadata/success": np.full((count, 1), episode % 2 == 0),
    }
    vectors = {key for key, feature in tiny.features.items() if feature.kind == "vector"}
    assert set(expected) == vectors
    for key, values in expected.items():
        found = tiny.numbers(key, place)
        assert found.dtype == np.float32 and tiny.features[key].shape == (found.shape[1],)
        np.testing.assert_array_equal(found, values.astype(np.float32), err_msg=key)
    assert list(tiny.texts("label", place)) == ["b"] * count
    assert list(tiny.texts("observation/natural_language_instruction", place)) == [TASKS[episode % 4]] * count
    assert list(tiny.texts("episode_metadata/file_path", place)) == [f"/raw/{episode}.npy"]
    wrist = tiny.pictures("observation/wrist_image", place, steps[::-1])
    np.testing.assert_array_equal(wrist, [picture(32, 32, episode, t, 1) for t in steps[::-1]])
    front = tiny.pictures("observation/image", place, steps).astype(int)
    wanted = np.array([picture(48, 64, episode, t, 0) for t in steps]).astype(int)
    assert np.abs(front - wanted).mean() < 8  # JPEG of hard edges
    others = np.abs(front[:-1] - wanted[1:]).mean(axis=(1, 2, 3))
    assert (others > np.abs(front - wanted)[:-1].mean(axis=(1, 2, 3))).all()


def test_roles_are_guessed_by_usual_names_and_say_so(tiny: RldsReader) -> None:
    roles = tiny.roles()
    assert roles.views == ("observation/image", "observation/wrist_image")
    assert roles.state == ("observation/state",)
    assert roles.text == "observation/natural_language_instruction"
    assert [key.split("/")[1] for key in roles.action] == [
        "world_vector",
        "rotation_delta",
        "gripper_closedness_action",
    ]
    assert set(roles.reasons) == {"views", "state", "action", "text"}
    assert "no preset" in roles.reasons["state"] and tiny.preset.gripper == "relative_closed"


@pytest.mark.parametrize(
    ("split", "episodes", "said"),
    [
        (None, ORDER[:5], "the split train is read; val not (sources.split)"),
        ("val", ORDER[5:], ""),
        ("all", ORDER, ""),
    ],
)
def test_splits_are_chosen_by_name_and_train_is_the_default(
    split: str | None, episodes: tuple[int, ...], said: str
) -> None:
    reader = RldsReader(TINY / "1.0.0", split=split)
    assert reader.lengths.tolist() == [6 + episode for episode in episodes]
    told = [line for line in reader.remarks if "sources.split" in line]
    assert told == [f"{reader.name}: {said}"] * bool(said)
    with pytest.raises(UserError, match=r"(?s)no split.*Did you mean 'train'"):
        RldsReader(TINY, split="trains")


def make(folder: Path, steps: dict[str, Any], episodes: list[dict[str, Values]], **outside: Any) -> Path:
    """A set of one file, and of a name without a preset."""
    records = [sets.example(one) for one in episodes]
    return sets.write_set(folder / "1.0.0", "mine", sets.episodes_of(steps, **outside), {"train": [records]})


def test_every_other_encoding(tmp_path: Path) -> None:
    count = 3
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, 5, 7, 3), dtype=np.uint8)
    codes = np.zeros((count, 16), np.int64)
    for row, text in zip(codes, ["push", "", "盘子 ok"], strict=True):
        row[: len(text)] = [*map(ord, text)]
    halves = np.array([[1.5, -2], [0, 3], [7, 8]], np.float16)
    steps = {
        "observation/png": sets.image(5, 7, 3),
        "observation/bare": sets.image(5, 7, 3),
        "observation/any_size": sets.image(-1, -1, 3),
        "observation/numbers": sets.tensor(5, 7, 3, dtype="uint8"),
        "observation/zlib": sets.tensor(5, 7, 3, dtype="uint8", encoding="zlib"),
        "observation/grey": sets.image(5, 7, 1),
        "observation/half": sets.tensor(2, dtype="float16"),
        "observation/half_bytes": sets.tensor(2, dtype="float16", encoding="bytes"),
        "observation/big": sets.tensor(dtype="uint64"),
        "observation/maybe": sets.tensor(2, optional=True),
        "observation/maybe_empty": sets.tensor(2, optional=True),
        "observation/open": sets.tensor(-1, 3),
        "observation/wide": sets.tensor(5000),
        "observation/instruction": sets.tensor(16, dtype="int32"),
        "observation/bounds": {"pythonClassName": "x.BBoxFeature", "boundingBox": {}},
        "language_instruction": TEXT,
        "kind": {"pythonClassName": "x.ClassLabel", "classLabel": {"numClasses": "3"}},
    }
    files = [sets.encoded(one) for one in pixels]
    values: dict[str, Values] = {
        "observation/png": [files[0], sets.encoded(pixels[1], "WEBP"), files[2]],
        "observation/bare": [one.tobytes() for one in pixels],
        "observation/any_size": files,
        "observation/numbers": pixels.astype(np.int64),
        "observation/zlib": [zlib.compress(one.tobytes()) for one in pixels],
        "observation/grey": files,
        "observation/half": halves.astype(np.float32),
        "observation/half_bytes": [one.tobytes() for one in halves],
        "observation/big": np.array([0, 2**63, 2**64 - 1], np.uint64).view(np.int64),
        "observation/maybe_empty": None,
        "observation/instruction": codes,
        "language_instruction": [b"a", b"", b"b"],
        "kind": np.array([2, -1, 0]),
    }
    values = sets.flags_of(count) | {f"steps/{key}": one for key, one in values.items()}
    nothing: dict[str, Values] = {
        key: one if key.startswith("steps/is") else None for key, one in values.items()
    }
    nothing |= {key: np.zeros(0, np.int64) for key in sets.flags_of(0)}
    folder = make(tmp_path, steps, [nothing, values])
    (folder / "steps-kind.labels.txt").write_text("a\nb\nc\n")
    reader = RldsReader(folder)
    assert reader.lengths.tolist() == [0, count]
    for key in ("bare", "any_size", "numbers", "zlib"):
        assert reader.features[f"observation/{key}"] == Feature(kind="picture", shape=(5, 7))
        found = reader.pictures(f"observation/{key}", 1, np.array([2, 0]))
        np.testing.assert_array_equal(found, pixels[[2, 0]], err_msg=key)
    np.testing.assert_array_equal(reader.pictures("observation/png", 1, np.array([0])), pixels[:1])
    assert reader.pictures("observation/png", 1, np.array([1])).shape == (1, 5, 7, 3)
    for key in ("half", "half_bytes"):
        np.testing.assert_array_equal(reader.numbers(f"observation/{key}", 1), halves.astype(np.float32))
    assert reader.numbers("observation/big", 1)[:, 0].tolist() == [0, 2.0**63, 2.0**64]
    for key in ("maybe", "maybe_empty"):
        assert np.isnan(reader.numbers(f"observation/{key}", 1)).all()
    assert reader.numbers("observation/half", 0).shape == (0, 2)
    assert list(reader.texts("observation/instruction", 1)) == ["push", "", "盘子 ok"]
    assert list(reader.texts("language_instruction", 1)) == ["a", "", "b"]
    assert list(reader.texts("kind", 1)) == ["c", "", "a"]
    said = "\n".join(reader.remarks)
    for key in ("grey", "open", "wide", "bounds"):
        assert f"observation/{key}" in said and f"observation/{key}" not in reader.features


def test_values_that_are_not_packed_and_keys_in_another_order_are_read(tmp_path: Path) -> None:
    def unpacked(values: list[int]) -> bytes:
        body = b"".join(b"\x08" + bytes([value]) for value in values)
        return b"\x1a" + bytes([len(body)]) + body

    def field(tag: int, content: bytes) -> bytes:
        return bytes([tag, len(content)]) + content

    flags, key = unpacked([1, 0, 0]), b"steps/is_first"
    plain = field(0x0A, key) + field(0x12, flags)
    turned = field(0x12, flags) + field(0x0A, key)
    records = [field(0x0A, field(0x0A, entry)) for entry in (plain, turned)]
    sets.write_set(tmp_path, "mine", sets.episodes_of({}), {"train": [records]})
    reader = RldsReader(tmp_path)
    assert reader.lengths.tolist() == [3, 3]
    for episode in (0, 1):
        assert reader.numbers("is_first", episode)[:, 0].tolist() == [1, 0, 0]


def as_text(node: dict[str, Any]) -> dict[str, Any]:
    """A node as files held it whose containers are JSON within a text."""
    if "featuresDict" in node:
        children = node["featuresDict"]["features"].items()
        content: Any = {name: as_text(one) for name, one in children}
    elif "sequence" in node:
        content = {"feature": as_text(node["sequence"]["feature"]), "length": None}
    else:
        return node
    return {"pythonClassName": node["pythonClassName"], "jsonFeature": {"json": json.dumps(content)}}


def as_old(node: dict[str, Any]) -> dict[str, Any]:
    """A node as old files have it: type and content."""
    (body,) = (value for key, value in node.items() if key != "pythonClassName")
    content: Any = dict(body)
    if "featuresDict" in node:
        content = {name: as_old(one) for name, one in body["features"].items()}
    elif "sequence" in node:
        content = {"feature": as_old(body["feature"]), "length": None}
    elif "shape" in content:
        sizes = [int(one) for one in content["shape"].get("dimensions", ())]
        content["shape"] = [None if one < 0 else one for one in sizes]
    return {"type": node["pythonClassName"], "content": content}


def as_protocol(node: dict[str, Any]) -> dict[str, Any]:
    """A node of type and content whose dictionaries are protocol messages."""
    if "featuresDict" not in node:
        return node
    inner = {name: as_protocol(one) for name, one in node["featuresDict"]["features"].items()}
    content = json.dumps({"features": inner})
    return {
        "type": node["pythonClassName"],
        "content": content,
        "proto_cls": "tensorflow_datasets.FeaturesDict",
    }


@pytest.mark.parametrize("form", [as_text, as_old, as_protocol])
def test_older_forms_of_features_json_say_the_same(
    form: Callable[[dict[str, Any]], dict[str, Any]], tiny: RldsReader, tmp_path: Path
) -> None:
    for path in (TINY / "1.0.0").iterdir():
        (tmp_path / path.name).symlink_to(path)
    written = json.loads((TINY / "1.0.0" / "features.json").read_text())
    (tmp_path / "features.json").unlink()
    (tmp_path / "features.json").write_text(json.dumps(form(copy.deepcopy(written))))
    reader = RldsReader(tmp_path, split="all")
    assert reader.features == tiny.features
    said, before = ([line.partition(": ")[2] for line in one.remarks] for one in (reader, tiny))
    assert said == before


def small(folder: Path, name: str = "mine", **info: Any) -> Path:
    """A set of three episodes of two, three and one step in two files."""
    records = [sets.example(sets.flags_of(count)) for count in (2, 3, 1)]
    splits = {"train": [records[:2], records[2:]]}
    return sets.write_set(folder, name, sets.episodes_of({}), splits, **info)


def test_the_highest_version_is_read(tmp_path: Path) -> None:
    for version in ("0.9.0", "0.10.0", "0.2.0"):
        small(tmp_path / version)
    (tmp_path / "0.9.0" / "features.json").rename(tmp_path / "0.9.0" / "other.json")
    (tmp_path / "1.0.0").mkdir()  # not finished
    reader = RldsReader(tmp_path)
    assert reader.lengths.tolist() == [2, 3, 1] and reader.name == str(tmp_path)
    with pytest.raises(UserError, match=r"(?s)no TFDS data set.*version folder"):
        RldsReader(tmp_path.parent)
    with pytest.raises(UserError, match=r"(?s)no TFDS data set.*found: .*other.json"):
        RldsReader(tmp_path / "0.9.0")


def test_old_dataset_info_names_shards_by_their_number(tmp_path: Path) -> None:
    small(tmp_path, splits=[{"name": "train", "numShards": "2", "numBytes": "1"}], description="x")
    assert RldsReader(tmp_path).lengths.tolist() == [2, 3, 1]


def test_a_template_names_the_files(tmp_path: Path) -> None:
    template = "{SPLIT}_{DATASET}.{SHARD_INDEX}of{NUM_SHARDS}.{FILEFORMAT}"
    splits = [{"name": "train", "shardLengths": ["2", "1"], "filepathTemplate": template}]
    small(tmp_path, splits=splits)
    for number in (0, 1):
        path = tmp_path / f"mine-train.tfrecord-0000{number}-of-00002"
        path.rename(tmp_path / f"train_mine.0000{number}of00002.tfrecord")
    assert RldsReader(tmp_path).lengths.tolist() == [2, 3, 1]


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({"fileFormat": "riegeli"}, r'fileFormat "riegeli" is not read.*tfrecord or array_record'),
        ({"fileFormat": "parquet"}, r'fileFormat "parquet" is not read'),
        ({"splits": []}, r"dataset_info.json: splits is wrong"),
        (
            {"splits": [{"name": "train", "shardLengths": ["2", "2"]}]},
            r"00001-of-00002 has 1 records.*expected: +2",
        ),
        ({"splits": [{"name": "train", "shardLengths": ["2", "x"]}]}, r"splits.0.shardLengths.1 is wrong"),
        (
            {"splits": [{"name": "train", "shardLengths": ["1"] * 9}]},
            r"00000-of-00009 is missing, 9 of 9 files",
        ),
        ({"splits": [{"name": "train"}]}, r"the splits have no shards"),
        (
            {"splits": [{"name": "train", "shardLengths": ["1"], "filepathTemplate": "../{SPLIT}"}]},
            r"filepathTemplate is",
        ),
    ],
)
def test_a_wrong_dataset_info_is_refused_by_key(tmp_path: Path, info: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"(?s){words}"):
        RldsReader(small(tmp_path, **info))


def test_sets_that_hold_no_episodes_are_refused(tmp_path: Path) -> None:
    features = sets.dictionary({"image": sets.image(28, 28, 3), "label": sets.tensor(dtype="int64")})
    sets.write_set(tmp_path, "mnist", features, {"train": [[b""]]})
    with pytest.raises(UserError, match=r"(?s)describes no episodes.*is_first.*label"):
        RldsReader(tmp_path)


def test_an_index_that_takes_long_is_kept_and_follows_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = small(tmp_path / "set"), tmp_path / "cache"
    monkeypatch.setattr(index, "_SLOW", 1e9)
    RldsReader(folder, cache=cache)
    assert not cache.exists()
    monkeypatch.setattr(index, "_SLOW", -1.0)
    assert RldsReader(folder, cache=cache).lengths.tolist() == [2, 3, 1]
    (kept,) = (cache / "rlds").iterdir()
    monkeypatch.setattr(index, "scan_records", None)  # what is kept is not made again
    reader = RldsReader(folder, cache=cache)
    assert reader.lengths.tolist() == [2, 3, 1]
    assert reader.numbers("is_last", 1)[:, 0].tolist() == [0, 0, 1]
    monkeypatch.undo()
    kept.write_bytes(kept.read_bytes()[:90])  # damaged
    assert RldsReader(folder, cache=cache).lengths.tolist() == [2, 3, 1]
    first = next(iter(sorted(folder.glob("*00000-of*"))))
    first.write_bytes(b"".join(sets.framed(sets.example(sets.flags_of(count))) for count in (3, 2)))
    os.utime(first, ns=(1, 1))
    assert RldsReader(folder, cache=cache).lengths.tolist() == [3, 2, 1]


def test_digests_of_pictures_are_those_of_the_records(tmp_path: Path) -> None:
    def reader(name: str, *shades: int) -> RldsReader:
        pictures = [[sets.encoded(np.full((4, 4, 3), shade, np.uint8))] * 2 for shade in shades]
        values = [sets.flags_of(2) | {"steps/observation/image": one} for one in pictures]
        return RldsReader(make(tmp_path / name, {"observation/image": sets.image(4, 4, 3)}, values))

    def digests(one: RldsReader) -> list[int]:
        return [one.picture_digest("observation/image", episode) for episode in range(len(one.lengths))]

    before, copied, changed = (digests(reader(name, *shades)) for name, shades in SHADES.items())
    assert before == copied
    assert [a == b for a, b in zip(before, changed, strict=True)] == [True, False]


SHADES = {"before": (1, 2), "copied": (1, 2), "changed": (1, 3)}


def test_array_record_asks_for_its_package(tmp_path: Path) -> None:
    small(tmp_path, fileFormat="array_record")
    for path in tmp_path.glob("*.tfrecord-*"):
        path.rename(tmp_path / path.name.replace("tfrecord", "array_record"))
    try:
        import array_record  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"(?s)array_record file.*pip install array_record"):
            RldsReader(tmp_path)
    else:
        with pytest.raises(UserError, match="damaged"):
            RldsReader(tmp_path)


def test_array_record_reads_the_same(tmp_path: Path) -> None:
    module = pytest.importorskip("array_record.python.array_record_module")
    small(tmp_path, fileFormat="array_record")
    records = [sets.example(sets.flags_of(count)) for count in (2, 3, 1)]
    for number, part in enumerate((records[:2], records[2:])):
        path = tmp_path / f"mine-train.array_record-0000{number}-of-00002"
        writer = module.ArrayRecordWriter(str(path), "group_size:1")
        for record in part:
            writer.write(record)
        writer.close()
    reader = RldsReader(tmp_path)
    assert reader.lengths.tolist() == [2, 3, 1]
    assert reader.numbers("is_last", 1)[:, 0].tolist() == [0, 0, 1]


def test_a_source_opens_the_fixture_as_any_other_data_set(tiny: RldsReader) -> None:
    store = SourceConfig(path=TINY, fps=10, split="val").open()
    assert store.format == "rlds" and [e.length for e in store.episodes] == [11, 12]
    assert store.spec.views == ("observation.image", "observation.wrist_image")
    assert (store.spec.state_dim, store.spec.action_dim, store.spec.fps) == (8, 7, 10)
    assert store.episodes[0].instruction == TASKS[1]
    rows = np.arange(3, 14)
    steps = [*range(3, 11), *range(3)]
    wrist = [picture(32, 32, 5 + (row > 10), t, 1) for row, t in zip(rows, steps, strict=True)]
    np.testing.assert_array_equal(store.frames("observation.wrist_image", rows), wrist)
    np.testing.assert_array_equal(store.states, np.concatenate([numbers_of(e, 6 + e)[0] for e in (5, 6)]))
    with pytest.raises(UserError, match=r"(?s)no split \"vals\".*sources.split"):
        SourceConfig(path=TINY, fps=10, split="vals").open()


def test_a_split_of_a_format_without_splits_is_refused() -> None:
    source = SourceConfig(path=TINY.parents[1] / "lerobot_v21" / "v21_image", split="train")
    with pytest.raises(
        UserError, match=r"(?s)sources.split is 'train'.*lerobot have none.*leave sources.split out"
    ):
        source.open()


def test_a_damaged_record_is_named_with_the_way_out(tmp_path: Path) -> None:
    for path in (TINY / "1.0.0").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "tiny_rlds-train.tfrecord-00001-of-00002"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1  # inside a picture
    shard.write_bytes(content)
    with pytest.raises(
        UserError, match=r"(?s)00001-of-00002: the record .*is damaged.*sources.exclude=\[3\]"
    ):
        SourceConfig(path=tmp_path, fps=10).open()
    assert len(SourceConfig(path=tmp_path, fps=10, exclude=(3,)).open().episodes) == 4


def test_the_benchmark_reads_all_that_it_wrote(tmp_path: Path) -> None:
    folder = rlds_speed.write(tmp_path / "set", 14)
    reader = RldsReader(folder)
    assert reader.lengths.tolist() == [rlds_speed.STEPS] * 10
    assert [len(reader.texts("language_instruction", 0)), reader.fps] == [rlds_speed.STEPS, 5]
    seconds = rlds_speed.measure(folder, 1)
    rows = rlds_speed.table_of(seconds, 2_000_000, 10).rows
    assert [row[0] for row in rows] == list(seconds) and len(rows) == 3
    assert float(rows[0][1].replace(",", "")) == pytest.approx(2 / seconds["index"].median, abs=1)
