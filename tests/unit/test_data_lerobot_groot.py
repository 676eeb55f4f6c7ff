"""GR00T's meta/modality.json: slices, cameras and annotations by their names, and what is chosen is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fixtures.lerobot_sets import (
    LENGTHS,
    TEXTS,
    VIEW,
    data_files,
    edit_data,
    edit_info,
    record,
    with_column,
    write_v21,
)
from fixtures.poses import Walk, write_poses
from tutti.data.conventions.config import CanonicalConfig, MotionConfig
from tutti.data.conventions.usual import usual_conventions
from tutti.data.episodes import EpisodeStore
from tutti.data.formats.detect import find_format
from tutti.data.sources import SourceConfig, open_parts
from tutti.errors import UserError

MODALITY: dict[str, Any] = {
    "state": {
        "left_arm": {"start": 0, "end": 3},
        "left_hand": {"start": 3, "end": 4, "original_key": "observation.state", "dtype": "float64"},
    },
    "action": {
        "left_arm": {"start": 0, "end": 2, "absolute": False, "rotation_type": "axis_angle"},
        "left_hand": {"start": 2, "end": 3, "range": [0, 1]},
    },
    "video": {"ego_view": {"original_key": VIEW}},
    "annotation": {"human.validity": {}, "human.action.task_description": {}},
}
DESCRIBED, VALIDITY = "annotation.human.action.task_description", "annotation.human.validity"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """tasks.jsonl holds the word "valid", each episode names it, and task_index is of no use."""
    folder = write_v21(tmp_path / "set")

    def annotated(table: pa.Table) -> pa.Table:
        table = table.append_column(DESCRIBED, table["task_index"])
        return table.append_column(VALIDITY, pa.array([3] * len(table)))

    edit_data(folder, annotated)
    edit_data(folder, with_column("task_index", lambda task: task * 0 + 3))
    scalar = {"dtype": "int64", "shape": [1], "names": None}
    edit_info(folder, lambda info: info["features"].update({DESCRIBED: scalar, VALIDITY: scalar}))
    edit_info(folder, lambda info: info.update(total_tasks=4))
    with (folder / "meta/tasks.jsonl").open("a") as file:
        file.write('{"task_index": 3, "task": "valid"}\n')
    path = folder / "meta/episodes.jsonl"
    lines = [json.loads(line) for line in path.open()]
    path.write_text("".join(json.dumps(one | {"tasks": [*one["tasks"], "valid"]}) + "\n" for one in lines))
    (folder / "meta/modality.json").write_text(json.dumps(MODALITY))
    return folder


def opened(folder: Path, **keys: Any) -> EpisodeStore:
    return SourceConfig.model_validate({"path": folder, **keys}).open()


def recorded(what: str) -> np.ndarray:
    return np.concatenate([getattr(record(*pair), what) for pair in enumerate(LENGTHS)])


def test_slices_and_cameras_go_by_their_names(folder: Path) -> None:
    store = opened(folder, state=["left_hand", "left_arm"], action="action.left_arm", views=["ego_view"])
    np.testing.assert_array_equal(store.states, recorded("states")[:, [3, 0, 1, 2]])
    np.testing.assert_array_equal(store.actions, recorded("actions")[:, :2])
    assert store.spec.state_names == ("left_hand", "left_arm[0]", "left_arm[1]", "left_arm[2]")
    assert store.spec.action_names == ("left_arm[0]", "left_arm[1]")
    assert store.spec.action_units == ("axis_angle, relative",) * 2
    assert store.spec.views == (VIEW,)
    assert store.frames(VIEW, np.arange(15)).shape == (15, 64, 64, 3)


def test_without_a_word_all_numbers_are_used_under_the_names_of_the_slices(folder: Path) -> None:
    store = opened(folder)
    np.testing.assert_array_equal(store.states, recorded("states"))
    assert store.spec.state_names == ("left_arm[0]", "left_arm[1]", "left_arm[2]", "left_hand")
    assert store.spec.action_units == ("axis_angle, relative", "axis_angle, relative", "")
    named = [remark.split(": ", 1)[1] for remark in store.remarks]
    assert named[0] == (
        "meta/modality.json names state: left_arm [0:3), left_hand [3:4); action: left_arm [0:2) "
        "(axis_angle, relative), left_hand [2:3); views: ego_view"
    )


def test_the_instruction_is_the_annotation_that_describes_the_task_and_that_is_told(folder: Path) -> None:
    store = opened(folder)
    assert tuple(one.instruction for one in store.episodes) == TEXTS
    assert store.remarks[-1].endswith(
        f"sources.text is auto: {DESCRIBED} "
        "(the task's description by meta/modality.json, not human.validity)"
    )
    assert {one.instruction for one in opened(folder, text="human.validity").episodes} == {"valid"}
    assert opened(folder, text=DESCRIBED).remarks == store.remarks[:-1]
    with pytest.raises(UserError, match=r"'human\.mood' is no annotation[\s\S]*human\.validity"):
        opened(folder, text="human.mood")


def posed(folder: Path, motion: dict[str, Any], absolute: bool | None) -> dict[str, Any]:
    """A source with a hand's pose under GR00T's names; it says what modality.json should tell."""
    said = write_poses(folder, [Walk(n, 30) for n in range(2)], motion, "quaternion_wxyz", "axis_angle")
    told = {} if absolute is None else {"absolute": absolute}
    turn = {"start": 3, "end": 6, "rotation_type": "axis_angle"}
    modality: dict[str, Any] = {
        "state": {
            "eef_position": {"start": 0, "end": 3},
            "eef_rotation": {"start": 3, "end": 7, "rotation_type": "quaternion"},
            "gripper_qpos": {"start": 7, "end": 8},
        },
        "action": {
            "eef_position_relative": {"start": 0, "end": 3, **told},
            "eef_rotation_relative": {**turn, **told},
            "gripper_qpos": {"start": 6, "end": 7},
        },
    }
    (folder / "meta/modality.json").write_text(json.dumps(modality))
    for vector in said["conventions"].values():
        del vector["gripper"]
    return said


@pytest.mark.parametrize("absolute", [None, True, False])
@pytest.mark.parametrize("kind", ["absolute", "delta"])
def test_targets_and_changes_are_told_or_known_by_the_numbers(
    tmp_path: Path, kind: str, absolute: bool | None
) -> None:
    said = posed(tmp_path / "set", {"kind": kind}, absolute)
    if absolute not in (None, kind == "absolute"):
        store = opened(tmp_path / "set")
        assert store.conventions.action.motion is None
        assert any("not in units of the state by the numbers" in line for line in store.remarks)
        return
    canonical = CanonicalConfig(actions="delta", rotation="rotation_6d")
    sources = [{"path": tmp_path / "set"}, said]
    one, other = (open_parts([SourceConfig.model_validate(own)], canonical)[0].store for own in sources)
    np.testing.assert_array_equal(one.states, other.states)
    np.testing.assert_array_equal(one.actions, other.actions)
    motion = {"kind": kind, "dimensions": "0-5", "state": "0-6"}
    assert one.conventions.action.motion == MotionConfig.model_validate(motion)
    how = "by meta/modality.json" if absolute is not None else "guessed: the actions are near"
    assert any(f"the action's 0-5 are {kind} ({how}" in line for line in one.remarks)
    found = find_format(tmp_path / "set").look(tmp_path / "set")
    assert found.told_by.get("action.motion") == (how if absolute is not None else None)
    # A training whose config asks for no other form learns the numbers as they are recorded.
    plain = open_parts([SourceConfig.model_validate(sources[0])])[0].store
    np.testing.assert_array_equal(plain.actions, opened(tmp_path / "set", conventions="none").actions)


def test_changes_in_units_of_their_own_are_not_taken_for_the_state_s(tmp_path: Path) -> None:
    posed(tmp_path / "set", {"kind": "delta", "scale": 0.05}, absolute=False)
    store = opened(tmp_path / "set")
    assert store.conventions.action.motion is None
    assert "delta by `absolute`, but not in units of the state" in "".join(store.remarks)
    # With canonical slots the gripper's name and the rotations are known all the same.
    usual = usual_conventions(store)
    assert [turn.form for turn in (*usual.state.rotations, *usual.action.rotations)] == [
        "quaternion_wxyz",
        "axis_angle",
    ]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"state": {"arm": {"start": 0, "end": 3}}}, "arm has other numbers"),
        ({"state": {"arm": {"start": 1, "end": 4}, "leg": {"start": 0, "end": 1}}}, "one behind the other"),
        (
            {"action": {"arm": {"start": 0, "end": 2}, "leg": {"start": 2, "end": 3, "absolute": True}}},
            "true, false",
        ),
        ({"state": {"arm": {"start": 0, "end": 3, "rotation_type": "matrix"}}}, "in a form that is not read"),
        ({}, "nor do the numbers tell"),
    ],
)
def test_why_a_motion_is_not_told_is_said(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    folder = write_v21(tmp_path / "set")
    arms = {"arm": {"start": 0, "end": 2}, "leg": {"start": 2, "end": 3}}
    (folder / "meta/modality.json").write_text(json.dumps({"state": arms, "action": arms} | change))
    store = opened(folder)
    assert store.conventions.action.motion is None
    assert sum(why in line for line in store.remarks) == 1, store.remarks


def test_what_is_in_it_is_found_without_a_number_read(folder: Path) -> None:
    for path in data_files(folder):
        path.write_bytes(b"not looked at")
    found = find_format(folder).look(folder)
    assert found.features["state.left_hand"].names == ("left_hand",)
    assert found.features["action.left_arm"].shape == (2,)
    assert found.roles.text == DESCRIBED and "human.validity" in found.roles.reasons["text"]


def test_without_its_column_the_task_of_a_row_is_the_instruction(tmp_path: Path) -> None:
    folder = write_v21(tmp_path / "set")
    (folder / "meta/modality.json").write_text(json.dumps(MODALITY))
    assert tuple(one.instruction for one in opened(folder).episodes) == TEXTS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": {"left_arm": {"start": 2, "end": 5}}}, r"state\.left_arm is \[2:5\)"),
        ({"state": {"left_arm": {"start": 3, "end": 3}}}, r"state\.left_arm is \[3:3\)"),
        ({"state": {"a": {"start": 0, "end": 1, "original_key": "nowhere"}}}, "'nowhere'"),
        ({"action": {"left_arm": {"start": "0", "end": 1}}}, r"action\.left_arm\.start is wrong"),
        ({"action": {"left_arm": {"start": 0, "end": 10**12}}}, r"action\.left_arm\.end is wrong"),
        ({"video": {"ego_view": {"original_key": 7}}}, "original_key is wrong"),
        ({"annotation": []}, "annotation is wrong"),
    ],
)
def test_a_modality_that_does_not_fit_is_named(folder: Path, change: dict[str, Any], message: str) -> None:
    (folder / "meta/modality.json").write_text(json.dumps(MODALITY | change))
    with pytest.raises(UserError, match=message) as caught:
        opened(folder)
    assert "modality.json" in str(caught.value) and "cure" in str(caught.value)


def test_a_name_that_is_in_neither_file_is_refused_with_those_that_are(folder: Path) -> None:
    with pytest.raises(UserError, match=r"'left_foot' is missing[\s\S]*left_arm"):
        opened(folder, state="left_foot")
    with pytest.raises(UserError, match="'side_view' is no camera"):
        opened(folder, views=["side_view"])
