"""Canonical slots: one place for one meaning over robots and formats, and each robot's own vector back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from fixtures import hdf5_sets, squares_data
from tutti import pipeline
from tutti.config.run_config import RunConfig, build_config
from tutti.data.config import DataConfig
from tutti.data.conventions.config import KEPT, VectorConventions
from tutti.data.conventions.slots import AUTO, _guessed, describe, places_in
from tutti.data.conventions.vectors import Layout
from tutti.data.formats.lerobot.writer import EpisodeRecord, write_lerobot
from tutti.data.sources import SourceConfig, open_parts
from tutti.serving.policy import Policy
from tutti.serving.prediction.place import Place
from tutti.types import DataNeeds, UserError

FRONT, LENGTH = "observation.images.front", 6
STATE = {"offsets": [1], "gripper": {"dimension": 9}}
TURN = {"rotation_type": "euler_angles_rpy"}
MODALITY: dict[str, Any] = {
    "state": {
        "base_position": {"start": 0, "end": 2},
        "end_effector_position": {"start": 2, "end": 5},
        "end_effector_rotation": {"start": 5, "end": 8, **TURN},
    },
    "action": {
        "gripper_close": {"start": 0, "end": 1},
        "end_effector_position_relative": {"start": 1, "end": 4, "absolute": False},
        "end_effector_rotation_relative": {"start": 4, "end": 7, "absolute": False, **TURN},
        "base_motion": {"start": 7, "end": 8},
    },
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Panda in LIBERO's HDF5, whose gripper is -1 when open, and a mobile robot with GR00T's modality.json,
    whose gripper is its first number and 0 when open."""
    home = tmp_path_factory.mktemp("slots")
    hdf5_sets.libero(home / "libero")
    for path in (home / "libero").iterdir():
        with h5py.File(path, "r+") as file:
            for demo in file["data"].values():  # pyright: ignore[reportAttributeAccessIssue]
                steps = np.arange(len(demo["actions"]))
                demo["actions"][:, 6] = np.where(steps % 2, 1.0, -1.0)
                demo["obs/gripper_states"][:, 0] = 0.04 * (steps % 3) / 2
                demo["obs/ee_states"][:, 3:] /= 4
    random = np.random.default_rng(0)
    made: list[EpisodeRecord] = []
    for _ in range(3):
        numbers = random.normal(size=(2, LENGTH, 8)).astype(np.float32) / 4
        numbers[1, :, 0] = np.arange(LENGTH) % 2
        pictures = random.integers(0, 256, (LENGTH, 16, 16, 3), dtype=np.uint8)
        made.append(
            EpisodeRecord(images={FRONT: pictures}, states=numbers[0], actions=numbers[1], instruction="go")
        )
    write_lerobot(home / "mobile", made, fps=20, views=(FRONT,), robot_type="mobile")
    (home / "mobile/meta/modality.json").write_text(json.dumps(MODALITY))
    return home


def sources(home: Path, **mobile: Any) -> list[dict[str, Any]]:
    return [
        {"path": str(home / "libero"), "views": {"front": "obs/agentview_rgb"}},
        {"path": str(home / "mobile"), "views": {"front": FRONT}, **mobile},
    ]


def config(home: Path, rotation: str = "rotation_6d", **mobile: Any) -> DataConfig:
    values = {"horizon": 3, "batch_size": 4, "image_size": 16, "validation_fraction": 0, "prefetch": 0}
    return DataConfig.model_validate(
        {**values, "slots": "canonical", "canonical": {"rotation": rotation}, "cache": {"folder": home}}
        | {"sources": sources(home, **mobile)}
    )


def test_two_formats_meet_in_slots_and_each_gets_its_own_numbers_back(home: Path) -> None:
    data = config(home).build(DataNeeds())
    spec, served = data.spec, data.served
    pose = (*(f"position[{n}]" for n in range(3)), *(f"rotation[{n}]" for n in range(6)), "gripper")
    assert spec.action_names == (*pose, "base")
    assert spec.state_names == (*pose, "base[0]", "base[1]", "other")
    panda, mobile = map(spec.robot, ("panda", "mobile"))
    assert panda.action_slots == tuple(range(10)) and mobile.action_slots == (9, *range(9), 10)
    assert panda.state_slots == (*range(10), 12) and mobile.state_slots == (10, 11, *range(9))
    remarks = " ".join(data.windows.remarks)
    for said in (
        "slots.state, guessed by conventions and names: base 0-1 (base_position[0], base_position[1])",
        "action.gripper dimension 0: 0 open, 1 closed, clipped",
        "action.rotation dimensions 4-6: euler_XYZ",
        "gripper dimension 6: -1 open, 1 closed, clipped; action.rotation dimensions 3-5: axis_angle, 0.5",
    ):
        assert said in remarks
    assert served is not None and served.source_of("mobile", 0) == 1
    opened = {"panda": (6, -1.0), "mobile": (0, 0.0)}
    for source in data.windows.sources:
        store, name = source.store, source.store.spec.embodiment
        rows = data.windows.rows_of(data.windows.sources.index(source), store.episodes[:1])[:2]
        chunks, mask = data.windows.chunks(rows)
        robots = data.replay(rows.tolist()).observation.robots
        slots = list(spec.robot(name).action_slots)
        assert robots is not None and robots.action is not None
        assert mask[0].any(0).nonzero().flatten().tolist() == sorted(slots)
        assert robots.action[0].nonzero().flatten().tolist() == sorted(slots)
        place = Place.of(spec, name, served, 0)
        own = data.normalizer.undo_action(place.taken(chunks[0].numpy()), name)
        gripper = own[:, slots.index(9)]
        assert place.conversion is not None and set(np.round(gripper, 5).tolist()) == {0.0, 1.0}
        recorded = SourceConfig.model_validate({"path": store.name, "conventions": "none"}).open()
        state = place.felt(recorded.states[0])
        found = place.conversion.record(own, state)
        np.testing.assert_allclose(found, recorded.actions[:3], atol=2e-5)
        number, value = opened[name]
        assert (gripper > 0.5).tolist() == (recorded.actions[:3, number] == value).tolist()
        assert place.spec.action_names == recorded.spec.action_names


def test_a_trained_policy_answers_in_each_robot_s_own_units_and_order(home: Path, tmp_path: Path) -> None:
    made: RunConfig = build_config(
        {
            "name": "slots",
            "data": config(home).model_dump(mode="json"),
            "model": squares_data.MODEL,
            "objective": {"align": None, "recon": None, "state": STATE},
            "training": {**squares_data.TRAINING, "steps": 2, "threads": 1, "validation": {"every": 0}},
            "evaluation": {"suite": "none"},
        },
        "the test",
    )
    pipeline.train(made, tmp_path / "run")
    policy = Policy.load(tmp_path / "run", "raw")
    picture = {"front": np.zeros((16, 16, 3), np.uint8)}
    panda = policy.predict(picture, np.array([0, 0, 0, 0, 0, 0.1, 0.02, -0.02]), "go", embodiment="panda")
    mobile = policy.predict(picture, np.zeros(8), "go", embodiment="mobile")
    assert panda.shape == (3, 7) and mobile.shape == (3, 8)
    assert policy.robot("panda").spec.action_names[-1] == "gripper"
    assert policy.robot("mobile").spec.action_names[0] == "gripper_close"


def test_what_would_mean_two_things_is_refused(home: Path) -> None:
    two = r"slot rotation of the state.*\n.*axis_angle.*\n.*euler_XYZ.*\n.*canonical"
    with pytest.raises(UserError, match=two):
        config(home, "keep").build(DataNeeds())
    moved = {"action": {"motion": {"kind": "absolute", "dimensions": "1-3", "state": "2-4"}}}
    with pytest.raises(UserError, match=r"slot position of the action.*\n.*delta.*\n.*absolute.*\n.*motion"):
        config(home, conventions=moved).build(DataNeeds())
    for slots, words in (
        ({"action": {"gripper": 7}}, "gripper is dimension 7, of which nothing tells"),
        ({"action": {"rotation": "4-5"}}, "cuts the rotation in dimensions 4-6"),
        ({"action": {"position": "6-8"}}, "names dimension 6-8, which is not there"),
        ({"state": {"position": "2-4", "rotation": "4-7"}}, "two parts name dimension 4"),
    ):
        with pytest.raises(UserError, match=words):
            config(home, slots=slots).build(DataNeeds())
    with pytest.raises(ValueError, match="expected 1 to 3 rising dimensions, found 4"):
        config(home, slots={"state": {"position": "0-3"}})
    with pytest.raises(ValueError, match=r"slots is plain; set data\.slots=canonical"):
        DataConfig.model_validate({"sources": sources(home, slots={"state": {"base": "0-1"}})})


def test_two_arms_and_what_is_said_of_a_source(home: Path) -> None:
    hdf5_sets.aloha(home / "aloha", jpeg=False)
    source = {"path": home / "aloha", "fps": 50, "labels": {"text": False}}
    (part,) = open_parts([SourceConfig.model_validate(source)], canonical_slots=True)
    arms = "joints 0-5, gripper 6, second_joints 7-12, second_gripper 13"
    assert part.store.slots is not None and describe(part.store.slots["action"]) == arms
    said = {"slots": {"action": {"joints": "7-12", "gripper": 13}}}
    (part,) = open_parts([SourceConfig.model_validate(source | said)], canonical_slots=True)
    assert part.store.slots is not None
    assert describe(part.store.slots["action"]) == "other 0-6, joints 7-12, gripper 13"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            "left_arm[0] left_arm[1] right_arm[0] left_hand[0]",
            "joints 0-1, second_joints 2, other 3",
        ),
        ("shoulder_pan.pos elbow_flex.pos wrist_roll.pos gripper.pos", "joints 0-2, other 3"),
        (
            "joint_position[0] joint_velocity[0] eef_position[0]",
            "joints 0, other 1, position 2",
        ),
        ("x y z roll pitch yaw object", "position 0-2, rotation 3-5, other 6"),
        (
            "robot0_x robot0_qw robot1_x",
            "position 0, rotation 1, second_position 2",
        ),
    ],
)
def test_names_tell_slots(names: str, expected: str) -> None:
    named = names.split()
    layout = Layout.of(VectorConventions(), len(named), KEPT, "a key")
    assert describe(_guessed(layout, named)) == expected


def test_places_are_slot_by_slot_as_wide_as_the_widest() -> None:
    places, names = places_in([("gripper", "position", "position"), ("joints", "position", "other")])
    assert places == [(3, 0, 1), (2, 0, 4)]
    assert names == ("position[0]", "position[1]", "joints", "gripper", "other")
    assert AUTO.state == "auto"
