"""Picture-text pairs: each layout gives the pictures and texts that it was made of, in one view, no robot."""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from fixtures import pair_sets, squares_data
from tutti.cli.app import app
from tutti.data.cache import cached_frames, resize_images
from tutti.data.config import DataConfig
from tutti.data.formats.detect import find_format
from tutti.data.formats.picture_text.reader import PairsReader
from tutti.data.formats.pictures import as_rgb
from tutti.data.sources import SourceConfig, open_parts
from tutti.runs.data_check import check_path
from tutti.types import DataNeeds, UserError

COUNT = 12


@pytest.mark.parametrize("layout", pair_sets.LAYOUTS)
def test_every_layout_gives_the_pictures_and_texts_it_was_made_of(tmp_path: Path, layout: str) -> None:
    folder = pair_sets.write(tmp_path / "set", layout)
    assert find_format(folder).name == "picture_text"
    store = SourceConfig(path=folder).open()
    assert store.is_pairs and store.format == "picture_text"
    assert [store.instructions[i] for i in store.instruction_of] == pair_sets.texts(COUNT)
    assert [episode.length for episode in store.episodes] == [1] * COUNT
    assert (store.spec.state_dim, store.spec.action_dim, store.spec.fps) == (0, 0, math.inf)
    (view,) = store.spec.views
    rows = np.random.default_rng(0).permutation(COUNT)
    own = pair_sets.pictures(COUNT)
    for row, picture in zip(rows.tolist(), store.rising(view, rows), strict=True):
        np.testing.assert_array_equal(picture, own[row])
    # Each is resized from its own size, once.
    frames = cached_frames(store, tmp_path / "cache", 16)
    np.testing.assert_array_equal(frames[:, 0], [resize_images(one[None], 16)[0] for one in own])
    assert not store.present["actions"].any() and store.present["text"].all()


def test_one_file_is_a_set_as_well_and_hidden_files_are_none(tmp_path: Path) -> None:
    folder = pair_sets.write(tmp_path / "set", "tar")
    (folder / ".00002.tar").write_bytes(b"junk")
    assert len(PairsReader(folder).lengths) == COUNT
    assert len(PairsReader(folder / "00001.tar").lengths) == COUNT // 2


def test_files_that_have_changed_are_read_anew_and_texts_do_not_depend_on_the_order(tmp_path: Path) -> None:
    pair_sets.write(tmp_path / "set", "parquet", 4)
    assert len(PairsReader(tmp_path / "set").lengths) == 4
    pair_sets.write(tmp_path / "set", "parquet", 8, 1)
    store = SourceConfig(path=tmp_path / "set").open()
    assert [store.instructions[i] for i in store.instruction_of] == pair_sets.texts(8)
    (tmp_path / "lines").mkdir()
    for rows in ([5, "a"], ["a", 5]):
        pair_sets.write_lines(tmp_path / "lines", [{"file_name": "x.png", "text": one} for one in rows])
        reader = PairsReader(tmp_path / "lines")
        with pytest.raises(UserError, match=f"line {rows.index(5) + 1}: .*text.* is no text"):
            reader.texts("text", rows.index(5))
        assert reader.texts("text", rows.index("a")) == ("a",)


def test_a_json_of_a_camera_of_a_side_has_its_texts(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "pairs.tar", "w") as archive:
        pair_sets.add(archive, "1.left.cam.png", pair_sets.encoded(pair_sets.pictures(1)[0]))
        pair_sets.add(archive, "1.left.cam.json", b'{"caption": "a", "more.text": "b"}')
    reader = PairsReader(tmp_path / "pairs.tar")
    texts = {key: one for key, one in reader.features.items() if one.kind == "text"}
    assert {key: reader.texts(key, 0) for key in texts} == {
        "left.cam.caption": ("a",),
        "left.cam.more.text": ("b",),
    }


def test_several_columns_are_features_and_the_usual_ones_are_taken(tmp_path: Path) -> None:
    folder = pair_sets.write(tmp_path / "set", "lines", 2)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    pair_sets.write_lines(
        folder,
        [row | {"depth": row["file_name"], "title": f"title {n}", "size": 3} for n, row in enumerate(rows)],
    )
    reader = PairsReader(folder)
    assert {key: one.kind for key, one in reader.features.items()} == {
        "file_name": "picture",
        "depth": "picture",
        "text": "text",
        "title": "text",
    }
    roles = reader.roles()
    assert (roles.views, roles.text, set(roles.reasons)) == (("file_name",), "text", {"views", "text"})
    assert "size" in reader.remarks[0]
    store = SourceConfig(path=folder, views=("depth",), text="title").open()
    assert store.spec.views == ("depth",) and store.instructions == ("title 0", "title 1")
    with pytest.raises(UserError, match=r"a pair has one picture[\s\S]*name one of them"):
        SourceConfig(path=folder, views=("depth", "file_name")).open()
    with pytest.raises(
        UserError, match=r"'state' of sources.state is missing[\s\S]*no vector in this data set"
    ):
        SourceConfig(path=folder, state=("state",)).open()


def turned(image: Image.Image) -> bytes:
    """A JPEG whose EXIF says that it was taken with the camera turned by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    image.save(content, "JPEG", exif=exif, quality=95)
    return content.getvalue()


def test_pictures_of_all_kinds_become_rgb(tmp_path: Path) -> None:
    def png(image: Image.Image, **options: Any) -> bytes:
        content = io.BytesIO()
        image.save(content, "PNG", **options)
        return content.getvalue()

    half = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 0, 0))
    np.testing.assert_array_equal(as_rgb(png(half)), [[[200, 0, 0], [255, 255, 255]]])  # on white
    np.testing.assert_array_equal(as_rgb(png(Image.new("L", (1, 1), 7))), [[[7, 7, 7]]])
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    np.testing.assert_array_equal(as_rgb(png(palette)), [[[9, 8, 7]]])
    assert as_rgb(turned(Image.new("RGB", (8, 4)))).shape == (8, 4, 3)
    with pytest.raises(ValueError, match="over 8 bits a channel"):
        as_rgb(png(Image.fromarray(np.zeros((2, 2), np.uint16))))


def test_parquet_pictures_may_be_plain_bytes_and_groups_of_one(tmp_path: Path) -> None:
    shown = pair_sets.pictures(5)
    table = pa.table(
        {"png": [pair_sets.encoded(one) for one in shown], "text": pair_sets.texts(5), "n": range(5)}
    )
    pq.write_table(table, tmp_path / "pairs.parquet", row_group_size=1)
    reader = PairsReader(tmp_path / "pairs.parquet")
    assert "n" in reader.remarks[0]
    for row in (3, 0, 4, 4):
        np.testing.assert_array_equal(reader.pictures("png", row, np.zeros(1, np.int64))[0], shown[row])


def test_a_pair_without_text_is_asked_for_and_may_be_masked(tmp_path: Path) -> None:
    folder = pair_sets.write(tmp_path / "set", "lines", 4)
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    lines[1] = json.dumps({"file_name": "pictures/001.png"})
    (folder / "pairs.jsonl").write_text("\n\n".join(lines))  # a blank line is none
    with pytest.raises(
        UserError, match=r"1 of the episodes have no instruction, such as 1[\s\S]*where_present"
    ):
        SourceConfig(path=folder).open()
    store = SourceConfig(path=folder, labels={"text": "where_present"}).open()
    assert store.present["text"].tolist() == [True, False, True, True]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A robot's set with two views, and pairs."""
    home = tmp_path_factory.mktemp("sets")
    robot = squares_data.write(home / "robot", squares_data.episodes(6))
    return robot, pair_sets.write(home / "pairs", "tar", 30)


def data(sets: tuple[Path, ...], **more: Any) -> DataConfig:
    values = {
        "sources": [{"path": str(one)} for one in sets],
        "horizon": 4,
        "batch_size": 8,
        "image_size": 32,
    }
    return DataConfig.model_validate(values | {"validation_fraction": 0.2, "prefetch": 0} | more)


NEEDS = DataNeeds(futures=(2, "last"), states=(2, "last"), labels=())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_what_a_pair_lacks_is_masked(sets: tuple[Path, Path], order: tuple[int, int]) -> None:
    built = data([sets[number] for number in order]).build(NEEDS)
    assert built.spec.embodiments == ("dot",) and built.spec.fps == 10 and len(built.spec.views) == 2
    windows = built.windows
    pairs, robot = (0, 30) if order[0] else (72, 0)
    batch = windows.gather(np.array([pairs + 3, robot + 4, pairs + 4]))
    here = [0, 2]
    assert batch.observation.image_mask.tolist() == [[True, False], [True, True], [True, False]]
    assert (
        not batch.observation.images[here, 1].any()
        and batch.observation.images[here, 0].any(dim=(1, 2, 3)).all()
    )
    assert batch.action_mask.any(dim=(1, 2)).tolist() == [False, True, False]
    assert batch.observation.state_mask.tolist() == [False, True, False]
    assert batch.observation.text_mask.any(dim=1).all()
    assert batch.embodiment.tolist() == [-1, 0, -1]
    for label in (2, "last"):
        assert batch.futures[label].mask.tolist() == [False, True, False]
    assert batch.later_states is not None
    assert batch.later_states.mask.tolist() == [[False, False], [True, True], [False, False]]
    own = pair_sets.pictures(30)
    np.testing.assert_array_equal(batch.observation.images[0, 0], resize_images(own[3][None], 32)[0])


def test_the_robot_s_split_statistics_and_windows_are_those_of_a_run_without_pairs(
    sets: tuple[Path, Path],
) -> None:
    alone, mixed = data(sets[:1]).build(NEEDS), data(sets).build(NEEDS)
    assert alone.parts[0].held_out == mixed.parts[0].held_out
    assert alone.normalizer.to_dict() == mixed.normalizer.to_dict()
    before, after = alone.windows.gather(np.arange(72)), mixed.windows.gather(np.arange(72))
    for name in ("images", "image_mask", "state", "state_mask"):
        np.testing.assert_array_equal(getattr(before.observation, name), getattr(after.observation, name))
    np.testing.assert_array_equal(before.actions, after.actions)
    # Policies are measured on the robot's windows alone.
    measured = mixed.measured()
    assert mixed.windows.known("actions", measured.rows).all() and len(measured.rows)
    counted = mixed.describe()
    assert counted["seconds"] == alone.describe()["seconds"]


def test_held_out_pairs_go_by_their_picture_alone(tmp_path: Path) -> None:
    folder = pair_sets.write(tmp_path / "set", "lines", 40)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    pair_sets.write_lines(folder, [*rows, *({**row, "text": f"also {row['text']}"} for row in rows)])
    (part,) = data([folder]).split(open_parts([SourceConfig(path=folder)]))
    held = {episode.index for episode in part.held_out}
    assert 2 < len(held) < 30 and {index % 40 for index in held if index < 40} == {
        i - 40 for i in held if i >= 40
    }
    few = pair_sets.write(tmp_path / "few", "lines", 20)
    (fewer,) = data([few]).split(open_parts([SourceConfig(path=few)]))
    assert {episode.index for episode in fewer.held_out} == {index for index in held if index < 20}


def test_a_count_of_episodes_per_task_is_not_for_pairs(sets: tuple[Path, Path]) -> None:
    built = data(sets, episodes_per_task=1, validation_fraction=0.0).build(NEEDS)
    assert [len(part.training) for part in built.parts] == [2, 30]


def test_a_picture_is_the_view_of_its_name_else_the_first(sets: tuple[Path, Path], tmp_path: Path) -> None:
    folder = pair_sets.write(tmp_path / "set", "lines", 4)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    named = squares_data.VIEWS[1]
    pair_sets.write_lines(folder, [{named: row["file_name"], "text": row["text"]} for row in rows])
    windows = data((sets[0], folder)).build(NEEDS).windows
    batch = windows.gather(np.array([72]))
    assert batch.observation.image_mask.tolist() == [[False, True]]
    assert batch.observation.images[0, 1].any() and not batch.observation.images[0, 0].any()


def test_several_texts_of_a_picture_are_no_copies_of_it(tmp_path: Path) -> None:
    folder = pair_sets.write(tmp_path / "set", "lines", 8)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    pair_sets.write_lines(folder, [*rows, *({**row, "text": f"also {row['text']}"} for row in rows)])
    assert check_path(str(folder)).findings == []
    pair_sets.write_lines(folder, [*rows, rows[0]])
    (finding,) = check_path(str(folder)).findings
    assert finding.kind == "duplicates"


def test_pairs_alone_are_refused(sets: tuple[Path, Path]) -> None:
    with pytest.raises(
        UserError, match=r"picture-text pairs alone[\s\S]*name a robot's data set beside them"
    ):
        data(sets[1:]).build(NEEDS)


def test_the_commands_say_what_it_is(sets: tuple[Path, Path], tmp_path: Path) -> None:
    robot, pairs = sets

    def run(*words: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, ["data", *words])
        assert done.exit_code == code, done.output
        return " ".join(done.output.split())

    said = run("inspect", str(pairs), "--sheet", str(tmp_path / "sheet.png"))
    assert "30 picture-text pairs" in said and "such as align" in said and "a second" not in said
    assert "conventions" not in said
    assert f"- {{path: {pairs}}}" in said and "robot none" not in said
    assert Image.open(tmp_path / "sheet.png").size > (100, 100)
    said = run("check", str(pairs), "--report", str(tmp_path / "page.html"))
    assert "30 picture-text pairs" in said and "Nothing is wrong" in said
    page = (tmp_path / "page.html").read_text()
    assert "image: some pictures" in page and "not finite" not in page and "episode lengths" not in page
    config = tmp_path / "mixed.yaml"
    config.write_text(
        json.dumps({"data": {"sources": [{"path": str(robot)}, {"path": str(pairs)}], "horizon": 4}})
    )
    said = run("check", str(config), "objective.state.offsets=[2]", "objective.recon.offsets=[2]")
    assert "robot dot" in said and "30 picture-text pairs" in said
    said = run("convert", str(pairs), str(tmp_path / "out"), code=2)
    assert "picture-text pairs" in said and not (tmp_path / "out").exists()


def test_conventions_of_the_robot_are_no_matter_for_pairs(sets: tuple[Path, Path]) -> None:
    robot, pairs = sets
    motion = {"action": {"motion": {"kind": "delta", "dimensions": "0-1"}}}
    sources = [{"path": str(pairs)}, {"path": str(robot), "conventions": motion}]
    built = data(sets, sources=sources, canonical={"actions": "relative"}).build(NEEDS)
    batch = built.windows.gather(np.array([3, 34, 4]))
    assert batch.action_mask.any(dim=(1, 2)).tolist() == [False, True, False]
    assert not batch.actions[[0, 2]].any() and batch.actions.isfinite().all()
