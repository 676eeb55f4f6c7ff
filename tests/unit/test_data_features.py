"""Which features of a LeRobotDataset are cameras, states and actions, and what their numbers are called."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures.small_model import SPEC
from tutti.config import RunConfig
from tutti.data.config import DataConfig
from tutti.data.content import Content
from tutti.data.formats.lerobot.features import Feature, describe_dimensions
from tutti.data.formats.lerobot.reader import LeRobotStore
from tutti.data.formats.lerobot.writer import EpisodeRecord, write_lerobot
from tutti.data.sources import SourceConfig
from tutti.runs.build import build_data
from tutti.serving.contents import read_spec
from tutti.storage.manifest import Manifest
from tutti.suites.metaworld.suite import MetaWorldSuite
from tutti.types import DataNeeds, DataSpec, Dimensions, UserError

VIEW = "observation.images.front"
JOINTS = "observation.joint_position"
NAMED = Dimensions(
    state_names=("x", "y", "gripper"), state_units=("m", "m", ""), action_names=("dx", "dy"), action_units=()
)


def write(folder: Path, dimensions: Dimensions = NAMED, robot: str = "arm") -> Path:
    random = np.random.default_rng(0)
    episodes = [
        EpisodeRecord(
            images={VIEW: random.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)},
            states=random.normal(size=(6, 3)).astype(np.float32),
            actions=random.normal(size=(6, 2)).astype(np.float32),
            instruction="open",
            extra={JOINTS: random.normal(size=(6, 2)).astype(np.float32)},
        )
        for _ in range(2)
    ]
    return write_lerobot(folder, episodes, fps=10, views=(VIEW,), robot_type=robot, dimensions=dimensions)


def edit(folder: Path, **features: dict[str, Any]) -> Path:
    """Changes these features of info.json; a new one is added."""
    path = folder / "meta" / "info.json"
    info = json.loads(path.read_text())
    for key, change in features.items():
        info["features"].setdefault(key, {}).update(change)
    path.write_text(json.dumps(info))
    return folder


def build(*sources: SourceConfig) -> DataSpec:
    data = DataConfig(sources=sources, horizon=2, image_size=16, validation_fraction=0)
    return data.build(DataNeeds()).spec


def spec_of(folder: Path, values: dict[str, Any]) -> DataSpec:
    """What a checkpoint with this spec.json says."""
    text = json.dumps(values).encode()
    (folder / "spec.json").write_bytes(text)
    entry = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (folder / "state.json").write_text(json.dumps({"files": {"spec.json": entry}}))
    return read_spec(Manifest.of(folder))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ("state[0]", "state[1]", "state[2]")),
        (["state"], ("state[0]", "state[1]", "state[2]")),
        (["x", "x", "y"], ("state[0]", "state[1]", "state[2]")),
        (["x", "", "y"], ("state[0]", "state[1]", "state[2]")),
        (["x", "a\nb", "y"], ("state[0]", "state[1]", "state[2]")),
        (7, ("state[0]", "state[1]", "state[2]")),
        (["x", "y", "grip"], ("x", "y", "grip")),
        ([["x", "y", "grip"]], ("x", "y", "grip")),
        ({"motors": ["x", "y", "grip"]}, ("x", "y", "grip")),
        ({"arm": {"motors": ["x", "y"]}, "hand": ["grip"]}, ("x", "y", "grip")),
        ({"left": ["x", "y"], "right": ["x"]}, ("left.x", "left.y", "right.x")),
        ({"grip": 2, "x": 0, "y": 1}, ("x", "y", "grip")),
    ],
)
def test_names_are_read_however_lerobot_writes_them(given: Any, expected: tuple[str, ...]) -> None:
    features = {"observation.state": Feature(dtype="float32", shape=[3], names=given)}
    assert describe_dimensions(features, ["observation.state"], "state")["state_names"] == expected


def test_joined_features_name_every_number_once() -> None:
    features = {
        "observation.joint_position": Feature(dtype="float32", shape=[2], units=["rad", "rad"]),
        "observation.left": Feature(dtype="float32", shape=[1], names=["grip"]),
        "observation.right": Feature(dtype="float32", shape=[1], names=["grip"], units=["m", "m"]),
    }
    first = describe_dimensions(features, list(features)[:2], "state")
    assert first["state_names"] == ("joint_position[0]", "joint_position[1]", "grip")
    assert first["state_units"] == ("rad", "rad", "")
    both = describe_dimensions(features, list(features)[1:], "state")
    assert both == {"state_names": ("left.grip", "right.grip"), "state_units": ()}


def test_names_and_units_reach_the_spec_of_a_model_and_come_back_from_its_file(tmp_path: Path) -> None:
    spec = build(SourceConfig(path=write(tmp_path / "set")))
    assert spec.dimensions() == NAMED.dimensions()
    assert spec_of(tmp_path, asdict(spec)) == spec
    older = {key: value for key, value in asdict(SPEC).items() if key not in NAMED.dimensions()}
    assert spec_of(tmp_path, older).state_names == ()
    with pytest.raises(UserError, match="state_names: expected 3, as state_dim says, or none; found 1"):
        spec_of(tmp_path, asdict(spec) | {"state_names": ["x"]})


def test_a_suite_names_all_of_its_numbers() -> None:
    named = MetaWorldSuite.dimensions
    for what in ("names", "units"):
        assert len(getattr(named, f"state_{what}")) == MetaWorldSuite.state_dim
        assert len(getattr(named, f"action_{what}")) == MetaWorldSuite.action_dim


def test_the_writer_refuses_names_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"action has \[2\] dimensions, but names \('dx',\)"):
        write(tmp_path / "set", Dimensions(action_names=("dx",)))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"state_names": ("y", "x", "gripper")}, "same names of state dimensions in another order"),
        ({"state_names": ("Y", "X", "finger")}, "same names of state dimensions in another order"),
        ({"state_units": ("mm", "m", "")}, "state dimension 'x' in 'm' and in 'mm'"),
        ({"state_names": ("X", "Y", "Gripper")}, ""),
        ({"state_names": ("hand_x", "hand_y", "opening"), "state_units": ()}, ""),
        ({"action_names": ()}, ""),
    ],
)
def test_only_names_and_units_that_contradict_each_other_are_refused(
    tmp_path: Path, other: dict[str, Any], problem: str
) -> None:
    first = write(tmp_path / "first")
    second = write(tmp_path / "second", Dimensions(**{**NAMED.dimensions(), **other}))
    sources = [SourceConfig(path=path) for path in (first, second)]
    if problem:
        with pytest.raises(UserError, match=problem):
            build(*sources)
    else:
        assert build(*sources).state_names == NAMED.state_names
    # The same rule tells whether the data of a run have changed.
    contents = [LeRobotStore(path).content for path in (first, second)]
    before = Content.from_dict(json.loads(json.dumps(contents[0].to_dict())))
    changes = contents[1].differences(before)
    assert bool(changes) == bool(problem) and problem in " ".join(changes)
    assert contents[0].fingerprint == contents[1].fingerprint


def test_states_and_actions_join_features_in_the_order_given(tmp_path: Path) -> None:
    folder = write(tmp_path / "set")
    plain = LeRobotStore(folder)
    joined = SourceConfig(path=folder, state=(JOINTS, "observation.state"), action=("action", JOINTS)).open()
    other = SourceConfig(path=folder, state=JOINTS).open()
    np.testing.assert_array_equal(joined.states, np.hstack([other.states, plain.states]))
    np.testing.assert_array_equal(joined.actions, np.hstack([plain.actions, other.states]))
    assert joined.spec.state_names == ("joint_position[0]", "joint_position[1]", "x", "y", "gripper")
    assert joined.spec.state_units == ("", "", "m", "m", "")
    assert (joined.spec.state_dim, joined.spec.action_dim) == (5, 4)
    assert SourceConfig(path=folder, state="none").open().spec.state_dim == 0


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"state": "observation.stat"}, r"observation\.stat' is missing"),
        ({"action": VIEW}, r"front' has the shape \[16, 16, 3\]"),
        ({"action": "none"}, "'none' is missing"),
        ({"state": ["action", "action"]}, "several different ones"),
        ({"action": []}, "the name of a feature"),
    ],
)
def test_a_wrong_feature_is_answered_with_those_that_would_do(
    tmp_path: Path, keys: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem) as refused:
        SourceConfig.model_validate({"path": write(tmp_path / "set"), **keys}).open()
    if isinstance(refused.value, UserError):
        assert f"observation.state [3], action [2], {JOINTS} [2]" in str(refused.value)
        (name,) = keys
        assert f"sources.{name}" in str(refused.value)
        assert ("or none for a policy without proprioception" in str(refused.value)) == (name == "state")


DEPTH = [
    {"dtype": "image", "shape": [16, 16, 1], "names": ["height", "width", "channels"]},
    {"dtype": "image", "shape": [1, 16, 16], "names": ["channels", "height", "width"]},
    {"dtype": "video", "shape": [16, 16, 3], "names": None, "info": {"video.is_depth_map": True}},
    {"dtype": "video", "shape": [16, 16, 3], "names": None, "info": {"is_depth_map": True}},
]


@pytest.mark.parametrize("feature", DEPTH)
def test_depth_and_mono_cameras_are_passed_over_and_refused_by_name(
    tmp_path: Path, feature: dict[str, Any]
) -> None:
    depth = "observation.images.depth"
    folder = edit(write(tmp_path / "set"), **{depth: feature})
    store = LeRobotStore(folder)
    assert store.spec.views == (VIEW,)
    (remark,) = store.remarks
    assert depth in remark and ("depth map" in remark or "one channel" in remark)
    assert LeRobotStore(folder, (VIEW,)).remarks == ()
    with pytest.raises(UserError, match=rf"{depth}'.*colour pictures(.*\n)*.*sources\.views.*{VIEW}"):
        LeRobotStore(folder, (VIEW, depth))
    edit(folder, **{VIEW: {"shape": [16, 16, 1]}})
    with pytest.raises(UserError, match=r"has no colour camera(.*\n)*.*depth"):
        LeRobotStore(folder)


def test_the_cameras_that_are_passed_over_are_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = edit(write(tmp_path / "set"), **{"observation.images.depth": DEPTH[0]})
    data = {"sources": [{"path": str(folder)}], "horizon": 2, "image_size": 16, "validation_fraction": 0}
    build_data(RunConfig.model_validate({"name": "x", "data": data}), tmp_path / "run")
    assert capsys.readouterr().out.count("observation.images.depth has one channel") == 1
