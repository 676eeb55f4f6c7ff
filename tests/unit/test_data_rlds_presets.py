"""Presets of the Open X sets: each reads a set of its layout, and says the conventions of its gripper."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rlds_sets as sets

from tutti.data.formats.rlds.presets import cut, find_preset, read_presets
from tutti.data.formats.rlds.reader import RldsReader

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


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_preset_reads_a_set_of_its_layout(name: str, tmp_path: Path) -> None:
    layout, state_dim, action_dim, gripper = LAYOUTS[name]
    generator = np.random.default_rng(0)
    made = {key: stored(kind, generator) for key, kind in layout.items()}
    example = sets.example(sets.flags_of(STEPS) | {f"steps/{key}": one[1] for key, one in made.items()})
    features = sets.episodes_of({key: one[0] for key, one in made.items()})
    reader = RldsReader(sets.write_set(tmp_path, name, features, {"train": [[example]]}))
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
