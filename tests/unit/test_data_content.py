"""Two data sets are the same where all that is used of them is: not by path, file size or layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damaged_sets import write_sound

from tutti.data.content import PARTS, Content, _ranges
from tutti.data.formats.lerobot.reader import LeRobotStore
from tutti.data.sources import check_unchanged
from tutti.types import UserError

GOOD = {"format": 1, "spec": "0"} | dict.fromkeys(PARTS, "00" * 8 * 4)
DATA = "data/chunk-000/file-000.parquet"


@pytest.fixture(scope="module", params=["image", "video"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "set"
    write_sound(folder, request.param)
    return folder


def edit(folder: Path, change: Callable[[pa.Table], pa.Table], name: str = DATA, **options: Any) -> None:
    pq.write_table(change(pq.read_table(folder / name)), folder / name, **options)


def scaled(table: pa.Table, factor: float, rows: slice) -> pa.Table:
    place = table.column_names.index("action")
    values = np.array(table["action"].to_pylist(), dtype=np.float32)
    values[rows] *= factor
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    return table.set_column(place, "action", column)


def test_a_copy_with_another_layout_is_the_same_set(sound: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(sound, copy)
    edit(copy, lambda table: table, compression="zstd", row_group_size=5)
    (copy / "meta" / "stats.json").write_text("{}\n")
    (copy / "README.md").write_text("copied")
    assert LeRobotStore(copy).fingerprint == LeRobotStore(sound).fingerprint


def test_changed_numbers_of_the_same_size_are_found_with_their_episodes(sound: Path, tmp_path: Path) -> None:
    copy = tmp_path / "set"
    shutil.copytree(sound, copy)
    edit(copy, lambda table: scaled(table, 10, slice(7, 15)))  # episodes 1 (rows 6 to 13) and 2
    before, after = LeRobotStore(sound).content, LeRobotStore(copy).content
    assert after.fingerprint != before.fingerprint
    assert after.differences(before) == ["actions differ in episodes 1 to 2"]
    assert before.differences(before) == []
    assert Content.from_dict(before.to_dict()).differences(before) == []


def test_changed_pictures_and_texts_are_found(sound: Path, tmp_path: Path) -> None:
    before = LeRobotStore(sound).content
    texts = tmp_path / "texts"
    shutil.copytree(sound, texts)
    edit(
        texts,
        lambda t: t.set_column(1, "task", [["shut the drawer", *t["task"].to_pylist()[1:]]]),
        "meta/tasks.parquet",
    )
    name = "meta/episodes/chunk-000/file-000.parquet"

    def rename(table: pa.Table) -> pa.Table:
        said = [[text.replace("open", "shut") for text in row] for row in table["tasks"].to_pylist()]
        return table.set_column(table.column_names.index("tasks"), "tasks", pa.array(said))

    edit(texts, rename, name)
    assert LeRobotStore(texts).content.differences(before) == ["instructions differ in episodes 0, 2"]
    pictures = tmp_path / "pictures"
    shutil.copytree(sound, pictures)
    view = "observation.images.wrist"
    if (video := pictures / "videos" / view / "chunk-000" / "file-000.mp4").exists():
        content = bytearray(video.read_bytes())
        content[len(content) // 2] ^= 1
        video.write_bytes(content)
        assert LeRobotStore(pictures).content.differences(before) == ["pictures differ in episodes 0 to 3"]
        return

    def swap(table: pa.Table) -> pa.Table:
        cells = table[view].to_pylist()
        cells[0]["bytes"], cells[1]["bytes"] = cells[1]["bytes"], cells[0]["bytes"]
        return table.set_column(table.column_names.index(view), view, pa.array(cells, type=table[view].type))

    edit(pictures, swap)
    assert LeRobotStore(pictures).content.differences(before) == ["pictures differ in episode 0"]


def test_other_numbers_of_episodes_and_other_rates_are_said(sound: Path) -> None:
    content = LeRobotStore(sound).content
    fewer = Content(content.spec, {name: many[:3] for name, many in content.episodes.items()})
    assert content.differences(fewer) == ["it had 3 episodes and has 4"]
    assert Content(content.spec + 1, content.episodes).differences(content) == [
        "the sizes, cameras or rate differ"
    ]


def test_numbers_in_words() -> None:
    assert _ranges([3]) == "episode 3"
    assert _ranges([0, 1, 2, 7, 9, 10]) == "episodes 0 to 2, 7, 9 to 10"
    assert _ranges(range(0, 40, 2)).endswith("18 and 10 more ranges")


@pytest.mark.parametrize(
    "wrong",
    [
        *({}, {"sources": 7}, {"sources": [7]}, {"sources": [{}]}, {"sources": [{"spec": "0"}]}),
        {"sources": [GOOD | dict.fromkeys(("spec", *PARTS), "zz")]},
        {"sources": [GOOD | dict.fromkeys(("spec", *PARTS), 5)]},
        {"sources": [GOOD | dict.fromkeys(PARTS, "00ff")]},
        {"sources": [GOOD | {"format": 0}]},
    ],
)
def test_a_spoilt_file_of_digests_is_named(sound: Path, tmp_path: Path, wrong: dict[str, Any]) -> None:
    (tmp_path / "data_content.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError, match=r"data_content\.json is damaged.*\n.*--redo"):
        check_unchanged([LeRobotStore(sound)], tmp_path / "data_content.json")
