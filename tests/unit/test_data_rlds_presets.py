"""Presets of the Open X sets: each reads a set of its layout, and says the conventions of its gripper."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rlds_sets as sets
import yaml

from tutti.data.checks.inspection import inspect_path
from tutti.data.episodes import EpisodeStore
from tutti.data.formats.rlds.presets import cut, find_preset, read_presets
from tutti.data.formats.rlds.reader import RldsReader
from tutti.data.sources import SourceConfig, open_parts
from tutti.runs.data_inspect import print_inspected

NATURAL, PLAIN = {"observation/natural_language_instruction": "text"}, {"language_instruction": "text"}
PARTS = {"action/world_vector": 3, "action/rotation_delta": 3, "action/terminate_episode": "int 3"}
CLOSEDNESS = {**NATURAL, **PARTS, "action/gripper_closedness_action": 1}
OPEN = {**NATURAL, **PARTS, "action/open_gripper": "bool"}
TWO_VIEWS = {**PLAIN, "action": 7, "observation/image": "image", "observation/wrist_image": "image"}
EXTERNAL = "_converted_externally_to_rlds"
LAYOUTS: dict[str, tuple[dict[str, Any], int, int, str]] = {
    "fractal20220817_data": (
        {
            **CLOSEDNESS,
            **{"observation/image": "image", "observation/base_pose_tool_reached": 7},
            **{"observation/gripper_closed": 1, "action/base_displacement_vector": 2},
        },
        *(8, 7, "relative_closed"),
    ),
    "kuka": (
        {
            **{**CLOSEDNESS, "observation/image": "image", "observation/gripper_closed": "zlib 1"},
            "observation/clip_function_input/base_pose_tool_reached": "zlib 7",
        },
        *(8, 7, "relative_closed"),
    ),
    "bridge_orig": (
        {
            **{**PLAIN, "action": 7, "observation/state": 7},
            **{f"observation/image_{number}": "image" for number in range(4)},
        },
        *(7, 7, "open_is_one"),
    ),
    "bridge": (
        {**OPEN, "observation/image": "image", "observation/image_1": "image", "observation/state": 7},
        *(7, 7, "open_is_one"),
    ),
    "droid": (
        {
            **{**PLAIN, "language_instruction_2": "text", "action": 7, "action_dict/gripper_position": 1},
            **{"action_dict/cartesian_velocity": 6, "action_dict/joint_position": 7},
            **{"observation/cartesian_position": 6, "observation/gripper_position": 1},
            **{"observation/joint_position": 7, "observation/exterior_image_1_left": "image"},
            **{f"observation/{name}": "image" for name in ("exterior_image_2_left", "wrist_image_left")},
        },
        *(7, 7, "closed_is_one"),
    ),
    "language_table": (
        {
            **{"action": 2, "observation/effector_translation": 2, "observation/rgb": "image"},
            "observation/instruction": "codes",
        },
        *(2, 2, "none"),
    ),
    "taco_play": (
        {
            **{**NATURAL, "action/rel_actions_world": 7, "action/actions": 7, "observation/robot_obs": 15},
            **{"observation/rgb_static": "image", "observation/rgb_gripper": "image"},
        },
        *(7, 7, "clipped_open"),
    ),
    "jaco_play": (
        {
            **{**NATURAL, "action/world_vector": 3, "action/gripper_closedness_action": 1},
            **{"observation/image": "image", "observation/image_wrist": "image"},
            "observation/end_effector_cartesian_pos": 7,
        },
        *(7, 4, "relative_closed"),
    ),
    "berkeley_autolab_ur5": (
        {
            **{**CLOSEDNESS, "action/gripper_closedness_action": "scalar", "observation/robot_state": 15},
            **{"observation/image": "image", "observation/hand_image": "image"},
        },
        *(8, 7, "relative_closed"),
    ),
    "roboturk": ({**CLOSEDNESS, "observation/front_rgb": "image"}, 0, 7, "clipped_closed"),
    "viola": (
        {
            **{**CLOSEDNESS, "action/gripper_closedness_action": "scalar", "observation/joint_states": 7},
            **{"observation/gripper_states": 1, "observation/agentview_rgb": "image"},
            "observation/eye_in_hand_rgb": "image",
        },
        *(8, 7, "clipped_closed"),
    ),
    "toto": ({**OPEN, "observation/image": "image", "observation/state": 7}, 7, 7, "open_is_one"),
    "bc_z": (
        {
            **{**NATURAL, "observation/image": "image", "action/future/xyz_residual": 30},
            **{"action/future/axis_angle_residual": 30, "action/future/target_close": "int 10"},
            **{"observation/present/xyz": 3, "observation/present/axis_angle": 3},
            "observation/present/sensed_close": 1,
        },
        *(7, 7, "closed_is_one"),
    ),
    **{
        name: ({**TWO_VIEWS, "observation/state": size}, 8, 7, "clipped_closed")
        for name, size in (
            (f"austin_buds_dataset{EXTERNAL}", 24),
            (f"austin_sailor_dataset{EXTERNAL}", 8),
            (f"austin_sirius_dataset{EXTERNAL}", 8),
            ("utaustin_mutex", 24),
        )
    },
    f"stanford_hydra_dataset{EXTERNAL}": ({**TWO_VIEWS, "observation/state": 27}, 7, 7, "closed_is_one"),
    f"dlr_edan_shared_control{EXTERNAL}": (
        {**PLAIN, "action": 7, "observation/image": "image", "observation/state": 7},
        *(7, 7, "closed_is_one"),
    ),
    f"furniture_bench_dataset{EXTERNAL}": (
        {**TWO_VIEWS, "action": 8, "observation/state": 35},
        *(8, 8, "clipped_closed"),
    ),
    f"iamlab_cmu_pickup_insert{EXTERNAL}": (
        {**TWO_VIEWS, "action": 20, "observation/state": 20},
        *(8, 8, "open_is_one"),
    ),
    "cmu_playing_with_food": (
        {
            **{**PLAIN, "action": 8, "observation/image": "image", "observation/state": 6},
            "observation/finger_vision_1": "image",
        },
        *(6, 8, "open_is_one"),
    ),
    "berkeley_fanuc_manipulation": (
        {**TWO_VIEWS, "action": 6, "observation/state": 13},
        *(7, 6, "none"),
    ),
    **{
        f"libero_{name}_no_noops": (
            {**TWO_VIEWS, "observation/state": 8, "observation/joint_state": 7},
            *(8, 7, "clipped_closed"),
        )
        for name in ("spatial", "10")
    },
}
"""Of each set what a step holds, as the set was published, the sizes of state and action, and the gripper."""
STEPS, TEXT = 3, "push the block"


def stored(kind: Any, generator: np.random.Generator) -> tuple[dict[str, Any], Any, np.ndarray]:
    """A feature's node, what its Example holds, and the numbers that it stands for."""
    word, _, size = str(kind).partition(" ")
    shape = (int(size or word),) if word not in ("image", "text", "codes", "bool", "scalar") else ()
    floats = generator.random((STEPS, *shape), np.float32)
    integers = generator.integers(0, 2, (STEPS, *shape))
    if word == "image":
        pixels = generator.integers(0, 256, (STEPS, 4, 6, 3), dtype=np.uint8)
        return sets.image(4, 6, 3), [sets.encoded(one) for one in pixels], pixels
    if word == "text":
        return sets.TEXT, [TEXT.encode()] * STEPS, np.empty(0)
    if word == "codes":
        codes = np.tile([*map(ord, TEXT), *[0] * (32 - len(TEXT))], (STEPS, 1))
        return sets.tensor(32, dtype="int32"), codes, np.empty(0)
    if word == "zlib":
        return sets.tensor(*shape, encoding="zlib"), [zlib.compress(one.tobytes()) for one in floats], floats
    if word in ("bool", "int"):
        return sets.tensor(*shape, dtype="bool" if word == "bool" else "int64"), integers, integers
    return sets.tensor(*shape), floats, floats


def published(name: str, folder: Path) -> dict[str, tuple[dict[str, Any], Any, np.ndarray]]:
    """Writes a set of this layout; gives what `stored` gives of each feature."""
    generator = np.random.default_rng(0)
    made = {key: stored(kind, generator) for key, kind in LAYOUTS[name][0].items()}
    example = sets.example(sets.flags_of(STEPS) | {f"steps/{key}": one[1] for key, one in made.items()})
    features = sets.episodes_of({key: one[0] for key, one in made.items()})
    sets.write_set(folder, name, features, {"train": [[example]]})
    return made


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_preset_reads_a_set_of_its_layout(name: str, tmp_path: Path) -> None:
    _, state_dim, action_dim, gripper = LAYOUTS[name]
    made, reader = published(name, tmp_path), RldsReader(tmp_path)
    roles, preset = reader.roles(), find_preset(name)
    assert preset is not None and reader.preset == preset
    assert roles.reasons == {}  # nothing was guessed
    assert (reader.fps, reader.embodiment, reader.preset.gripper) == (preset.fps, preset.robot, gripper)
    assert any(f"known as {name}" in line for line in reader.remarks)
    for keys, size in ((roles.state, state_dim), (roles.action, action_dim)):
        read = [reader.numbers(key, 0) for key in keys]
        assert [reader.features[key].shape[0] for key in keys] == [one.shape[1] for one in read]
        assert sum(one.shape[1] for one in read) == size
        for key, values in zip(keys, read, strict=True):
            whole, part = cut(key)
            np.testing.assert_array_equal(values, made[whole][2].reshape(STEPS, -1)[:, part], err_msg=key)
    assert roles.text is not None and set(reader.texts(roles.text, 0)) == {TEXT}
    for view in roles.views:
        np.testing.assert_array_equal(reader.pictures(view, 0, np.arange(STEPS)), made[view][2])


def as_octo_has_it(commands: np.ndarray) -> np.ndarray:
    """Octo's rel2abs_gripper_actions: 1 open, 0 closed."""
    asked = np.where(commands < -0.1, 1, np.where(commands > 0.1, -1, 0))
    now = -asked[np.argmax(asked != 0)] or 1
    held = []
    for one in asked:
        now = one or now
        held.append(now / 2 + 0.5)
    return np.array(held)


OPEN_SHARE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "open_is_one": lambda x: x,
    "closed_is_one": lambda x: 1 - x,
    "clipped_open": lambda x: np.clip(x, 0, 1),
    "clipped_closed": lambda x: 1 - np.clip(x, 0, 1),
    "relative_closed": as_octo_has_it,
}
"""As OpenVLA and Octo bring each to 1 = open."""


def learned(path: Path, **more: Any) -> EpisodeStore:
    return open_parts([SourceConfig(path=path, fps=10, **more)])[0].store


@pytest.mark.parametrize("name", LAYOUTS)
def test_its_conventions_are_used_unless_a_source_says_otherwise(name: str, tmp_path: Path) -> None:
    published(name, tmp_path)
    gripper, preset = LAYOUTS[name][3], find_preset(name)
    more: dict[str, Any] = {} if LAYOUTS[name][1] else {"state": "none"}
    usual, plain = learned(tmp_path, **more), learned(tmp_path, conventions="none", **more)
    np.testing.assert_array_equal(usual.states, plain.states)
    expected = plain.actions.copy()
    if gripper != "none":
        expected[:, -1] = OPEN_SHARE[gripper](plain.actions[:, -1].astype(np.float64))
    np.testing.assert_array_equal(usual.actions, expected)
    assert usual.fingerprint == plain.fingerprint and usual.identities == plain.identities
    hand = {"action": {"gripper": {"dimension": 0, "open": 0, "closed": 2}}}
    own = learned(tmp_path, conventions=hand, **more)
    np.testing.assert_allclose(own.actions[:, 0], 1 - plain.actions[:, 0] / 2, atol=1e-7)
    np.testing.assert_array_equal(own.actions[:, 1:], plain.actions[:, 1:])
    assert preset is not None
    turned = usual.conventions.action.rotations
    assert [one.dimensions for one in turned] == {"none": [], "quaternion": ["3-6"]}.get(
        preset.rotation, ["3-5"]
    )


def test_what_is_known_and_guessed_of_the_conventions_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published("droid", tmp_path)
    print_inspected(inspect_path(tmp_path))
    told = capsys.readouterr().out
    assert "action.gripper  dimension 6: 0 open, 1 closed   by the preset of droid\n" in told
    assert "action.rotation dimensions 3-5: euler_xyz   by the preset of droid; guessed: their order" in told
    config = yaml.safe_load(told[told.index("name: mine") :])  # what was guessed is said there
    assert config["data"]["sources"][0]["conventions"]["action"]["rotation"]["form"] == "euler_xyz"
    remarks = " ".join(learned(tmp_path).remarks)
    assert "brought to one form: action.gripper dimension 6: 0 open, 1 closed" in remarks
    other = learned(tmp_path, action=["action"])
    np.testing.assert_array_equal(
        other.actions, learned(tmp_path, action=["action"], conventions="none").actions
    )
    assert "conventions are of, which are left out" in " ".join(other.remarks)


def test_every_preset_has_a_layout_and_every_name_finds_its_own() -> None:
    found = {id(find_preset(name)) for name in LAYOUTS}
    assert found == {id(one) for one in read_presets().values()}
    names = {name for pattern, one in read_presets().items() for name in (pattern, *one.names)}
    assert {name for name in names if "*" not in name} - set(LAYOUTS) == {"bridge_dataset"}
    assert find_preset("bridge_dataset") == find_preset("bridge_orig")
    assert find_preset("libero_spatial") is None


def test_a_set_that_lacks_what_its_preset_names_is_guessed_and_says_so(tmp_path: Path) -> None:
    steps = {
        "action": sets.tensor(6),
        "observation/proprio": sets.tensor(2),
        **{"language_instruction": sets.TEXT},
    }
    values = {
        "action": np.ones((1, 6)),
        "observation/proprio": np.ones((1, 2)),
        "language_instruction": [b""],
    }
    example = sets.example(sets.flags_of(1) | {f"steps/{key}": one for key, one in values.items()})
    folder = sets.write_set(tmp_path, "toto", sets.episodes_of(steps), {"train": [[example]]})
    reader = RldsReader(folder)
    roles = reader.roles()
    assert (roles.views, roles.state, roles.action) == ((), ("observation/proprio",), ("action",))
    assert roles.text == "language_instruction" and set(roles.reasons) == {"views", "state", "action", "text"}
    assert "observation/state, which this set lacks" in roles.reasons["state"]
    assert (reader.preset.gripper, reader.fps) == ("unknown", 30)
