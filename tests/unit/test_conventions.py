"""Conventions of states and actions: what is learned, against scipy, and back to what was recorded."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fixtures.poses import STEPS, Walk, decoded, recorded
from fixtures.toy_reader import ToyReader
from tutti.data.conventions.chunks import chunks_of
from tutti.data.conventions.config import CanonicalConfig, ConventionsConfig, GripperConfig, MotionConfig
from tutti.data.conventions.conversion import Conversion
from tutti.data.conventions.rotations import FORMS, size_of
from tutti.data.conventions.store import apply
from tutti.data.episodes import WHERE_PRESENT
from tutti.data.formats.chosen import Chosen
from tutti.data.formats.mapped import MappedStore
from tutti.data.formats.wanted import Wanted
from tutti.data.normalize import Normalizer
from tutti.data.opened import Source
from tutti.data.tokenize import Tokenizer
from tutti.data.windows import WindowIndex
from tutti.errors import UserError

ANGLE, NUMBER = 2e-6, 1e-5
"""Radians, and shares of numbers around 1: float32 goes in, between and out."""
SOURCES: tuple[dict[str, Any], ...] = (
    {"kind": "absolute"},
    {"kind": "delta"},
    {"kind": "delta", "frame": "hand", "scale": 0.05},
)
CANONICAL: tuple[dict[str, Any], ...] = (
    {"actions": "keep"},
    {"actions": "absolute"},
    {"actions": "delta"},
    {"actions": "delta", "frame": "hand"},
    {"actions": "relative"},
    {"actions": "relative", "frame": "hand"},
)
TURN_FORMS = ("euler_xyz", "euler_ZYX", "quaternion_wxyz", "quaternion_xyzw", "axis_angle", "rotation_6d")


def conversion(said: ConventionsConfig, canonical: CanonicalConfig, states: Any, actions: Any) -> Conversion:
    sizes = {"state_dim": states.shape[1], "action_dim": actions.shape[1]}
    return Conversion.of(said, canonical, **sizes, name="toy")


def assert_pose(found: np.ndarray, expected: np.ndarray, form: Any) -> None:
    scale = max(1.0, np.abs(expected[..., :3]).max())
    assert np.abs(found[..., :3] - expected[..., :3]).max() < NUMBER * scale
    turns = slice(3, 3 + size_of(form))
    between = decoded(found[..., turns], form) * decoded(expected[..., turns], form).inv()
    assert between.magnitude().max() < ANGLE


@settings(max_examples=5, deadline=None, phases=[Phase.generate])
@given(st.integers(0, 2**32 - 1))
def test_every_pair_of_conventions_is_learned_as_scipy_says_and_leads_back(seed: int) -> None:
    walk = Walk(seed)
    starts, count = np.array([0]), len(TURN_FORMS)
    for number, (source, target) in enumerate(product(SOURCES, CANONICAL)):
        state_form, action_form = TURN_FORMS[(seed + number) % count], TURN_FORMS[(seed // count) % count]
        for form in ("keep", "rotation_6d", "quaternion_xyzw"):
            canonical = CanonicalConfig(rotation=form, **target)  # type: ignore[arg-type]
            said, states, actions = recorded(walk, source, state_form, action_form)
            made = conversion(said, canonical, states, actions)
            learned_states, learned = made.learn(states, actions, starts)
            form_learned = action_form if form == "keep" else form
            frame = target.get("frame", "base")
            kind, more = target["actions"], {"frame": frame}
            if kind == "keep":
                kind, more = source["kind"], {key: source[key] for key in source if key != "kind"}
            if made.relative:
                chunk = made.relative.relative(learned[None], learned_states[:1])[0].astype(np.float32)
            else:
                chunk = learned
            assert_pose(chunk, walk.actions(kind, form_learned, **more), form_learned)
            assert_pose(
                learned_states,
                walk.states(state_form if form == "keep" else form),
                state_form if form == "keep" else form,
            )
            for vector in (chunk, learned_states):
                np.testing.assert_allclose(vector[:, -1], walk.open, atol=1e-6)
            back = made.record(chunk, learned_states[0])
            assert_pose(back, actions, action_form)
            np.testing.assert_allclose(back[:, -1], actions[:, -1], atol=1e-6)
            one = made.learn_state(states[0])
            np.testing.assert_array_equal(one, learned_states[0])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_every_other_one_and_comes_back(form: Any) -> None:
    walk = Walk(3, steps=40)
    for learned_form in FORMS:
        canonical = CanonicalConfig(rotation=learned_form)
        said, states, actions = recorded(walk, {"kind": "absolute"}, form, form)
        made = conversion(said, canonical, states, actions)
        learned_states, learned = made.learn(states, actions, np.array([0]))
        assert_pose(learned, walk.actions("absolute", learned_form), learned_form)
        assert_pose(made.record(learned, learned_states[0]), actions, form)
        assert_pose(made.state.record(learned_states), states, form)


def test_the_first_action_of_a_chunk_needs_no_reached_target() -> None:
    """Whatever the robot does later: what it is told first is exact for a hand that follows nothing."""
    walk, still = Walk(1), Walk(2)
    said, _, actions = recorded(walk, {"kind": "absolute"}, "quaternion_xyzw", "euler_xyz")
    _, states, _ = recorded(still, {"kind": "absolute"}, "quaternion_xyzw", "euler_xyz")
    made = conversion(said, CanonicalConfig(actions="delta", frame="hand"), states, actions)
    learned_states, learned = made.learn(states, actions, np.array([0]))
    for row in range(STEPS):
        assert_pose(
            made.record(learned[row : row + 1], learned_states[row]), actions[row : row + 1], "euler_xyz"
        )


def test_what_nothing_is_said_of_stays_to_the_bit() -> None:
    generator = np.random.default_rng(0)
    states, actions = generator.normal(size=(2, 9, 8)).astype(np.float32)
    made = conversion(ConventionsConfig(), CanonicalConfig(), states, actions)
    assert not made.changes
    hand = {"action": {"gripper": {"dimension": 3, "open": 1, "closed": 0}}}
    made = conversion(ConventionsConfig.model_validate(hand), CanonicalConfig(), states, actions)
    np.testing.assert_array_equal(made.learn(states, actions, np.array([0])), [states, actions])
    rotation = {"action": {"rotation": {"dimensions": "1-3", "form": "euler_xyz", "scale": 0.1}}}
    assert not conversion(
        ConventionsConfig.model_validate(rotation), CanonicalConfig(), states, actions
    ).changes  # it is kept


def hand(values: str, opened: float = 1.0, closed: float = 0.0) -> Conversion:
    said = {"gripper": {"dimension": 1, "open": opened, "closed": closed, "values": values}}
    return Conversion.of(
        ConventionsConfig.model_validate({"action": said}),
        CanonicalConfig(),
        state_dim=1,
        action_dim=3,
        name="toy",
    )


def learned(made: Conversion, values: list[float], starts: tuple[int, ...] = (0,)) -> list[float]:
    actions = np.zeros((len(values), 3), np.float32)
    actions[:, 1] = values
    return made.learn(np.zeros((len(values), 1), np.float32), actions, np.array(starts))[1][:, 1].tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(1, 0), (0, 1), (-1, 1), (1, -1), (0.08, 0), (0, 0.7), (-0.04, 0.0)]),
    st.sampled_from(["range", "clipped", "two", "changes"]),
    st.lists(st.floats(0, 1), min_size=1, max_size=20),
)
def test_a_gripper_becomes_0_closed_to_1_open_and_comes_back(
    ends: tuple[float, float], values: str, share: list[float]
) -> None:
    made, (opened, closed) = hand(values, *ends), ends
    if values in ("two", "changes"):
        share = [round(one) for one in share]
    given = [closed + one * (opened - closed) for one in share]
    assert learned(made, given) == pytest.approx(share, abs=1e-6)
    chunk = np.zeros((len(share), 3), np.float32)
    chunk[:, 1] = share
    assert made.record(chunk, np.zeros(1, np.float32))[:, 1].tolist() == pytest.approx(given, abs=1e-6)


def test_a_gripper_that_is_told_by_its_changes_is_held_in_each_episode() -> None:
    """As Octo and OpenVLA integrate it: before the first change the opposite, open where there is none."""
    made = hand("changes", opened=-1, closed=1)
    found = learned(made, [0, 0, 1, 0, -1, 0, 0, -1, 0, 0, 0, 1, 0.05], (0, 6, 9, 11))
    assert found == [1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 0]
    assert learned(made, [float("nan"), 1])[1] == 0


def test_a_clipped_gripper_is_cut_off_and_two_values_are_answered_exactly() -> None:
    assert learned(hand("clipped", 0, 1), [-0.3, 0.25, 1.4]) == [1, 0.75, 0]
    chunk = np.array([[0, 0.4, 0], [0, 0.6, 0]], np.float32)
    assert hand("two", -1, 1).record(chunk, np.zeros(1, np.float32))[:, 1].tolist() == [1, -1]


def test_angles_in_degrees_and_shares_of_a_controller_have_a_scale() -> None:
    walk = Walk(5)
    turn = {"dimensions": "3-5", "form": "euler_xyz", "scale": np.pi / 180}
    said = ConventionsConfig.model_validate({"action": {"rotation": turn}})
    actions = walk.actions("absolute", "euler_xyz", angle=np.pi / 180).astype(np.float32)
    made = conversion(said, CanonicalConfig(rotation="rotation_6d"), np.zeros((STEPS, 0)), actions)
    found = made.learn(np.zeros((STEPS, 0)), actions, np.array([0]))[1]
    assert_pose(found, walk.actions("absolute", "rotation_6d"), "rotation_6d")
    back = made.record(found, np.zeros(0, np.float32))
    np.testing.assert_allclose(back, actions, atol=2e-4)  # degrees


def test_names_and_units_are_those_of_the_learned_numbers() -> None:
    said, states, actions = recorded(Walk(0), {"kind": "absolute"}, "quaternion_wxyz", "euler_xyz")
    made = conversion(said, CanonicalConfig(rotation="rotation_6d"), states, actions)
    names, units = made.action.names([*"xyzabc", "hand"], [*"mmm", "rad", "rad", "rad", "m"])
    assert names == (*"xyz", *(f"rotation_6d[{number}]" for number in range(6)), "hand")
    assert units == (*"mmm", *[""] * 7)
    assert made.state.names((), ()) == ((), ())
    assert (made.state.learned_dim, made.action.learned_dim) == (10, 10)


ROTATION = {"dimensions": "3-5", "form": "euler_xyz"}
GRIPPER = {"dimension": 6, "open": 1, "closed": 0}


@pytest.mark.parametrize(
    ("said", "canonical", "words"),
    [
        ({"action": {"gripper": {**GRIPPER, "dimension": 9}}}, {}, ["names dimension 9", "0 to 6"]),
        ({"action": {"gripper": {**GRIPPER, "dimension": -8}}}, {}, ["names dimension -1", "0 to 6"]),
        (
            {"action": {"gripper": {**GRIPPER, "dimension": 4}, "rotation": ROTATION}},
            {},
            ["toy: sources.conventions.action", "two parts name dimension 4", "3-5 and 4-4"],
        ),
        ({"state": {"rotation": {**ROTATION, "dimensions": "6-8"}}}, {}, ["state names dimension 6-8"]),
        ({}, {"actions": "relative"}, ["data.canonical.actions is relative", "motion"]),
        (
            {"action": {"motion": {"kind": "delta", "dimensions": "0-5", "state": "0-4"}}},
            {"actions": "absolute"},
            ["not as many", "0-4"],
        ),
        (
            {"action": {"rotation": ROTATION, "motion": {"kind": "delta", "dimensions": "0-5"}}},
            {"actions": "absolute"},
            ["only one is a rotation", "state.rotation"],
        ),
        (
            {"action": {"motion": {"kind": "absolute", "dimensions": "0-5"}}},
            {"actions": "relative", "frame": "hand"},
            ["axes of the hand", "frame base"],
        ),
        (
            {"action": {"motion": {"kind": "absolute", "dimensions": "0-7"}}},
            {"actions": "relative"},
            ["motion.dimensions names dimension 0-7"],
        ),
    ],
)  # fmt: skip
def test_conventions_that_do_not_fit_are_refused(
    said: dict[str, Any], canonical: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        conversion(
            ConventionsConfig.model_validate(said),
            CanonicalConfig(**canonical),
            np.zeros((2, 7)),
            np.zeros((2, 7)),
        )
    assert all(word in str(error.value) for word in [*words, "cure:"]), error.value


@pytest.mark.parametrize(
    ("config", "values", "words"),
    [
        (GripperConfig, {"dimension": 0, "open": 1, "closed": 1}, "both 1"),
        (ConventionsConfig, {"action": {"rotation": {**ROTATION, "dimensions": "5-3"}}}, "rising"),
        (
            ConventionsConfig,
            {"action": {"rotation": {**ROTATION, "dimensions": "3-6"}}},
            "euler_xyz has 3 numbers, '3-6' are 4",
        ),
        (CanonicalConfig, {"near": (0, 0, 0, 0)}, "only zeros"),
        (CanonicalConfig, {"frame": "hand"}, "delta and relative"),
        (ConventionsConfig, {"state": {"gripper": {**GRIPPER, "values": "changes"}}}, "commands"),
        (MotionConfig, {"kind": "absolute", "dimensions": "0-1", "scale": 2}, "those of a delta"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(config: Any, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config.model_validate(values)


def test_a_predicted_rotation_without_a_direction_is_not_given_to_the_robot() -> None:
    said, states, actions = recorded(Walk(0), {"kind": "absolute"}, "euler_xyz", "euler_xyz")
    made = conversion(said, CanonicalConfig(rotation="rotation_6d"), states, actions)
    learned_states, chunk = made.learn(states, actions, np.array([0]))
    chunk[2, 6:9] = 2 * chunk[2, 3:6]
    with pytest.raises(UserError, match="no direction"):
        made.record(chunk, learned_states[0])


def test_a_robots_state_is_checked_and_its_gripper_may_lie_outside() -> None:
    said, states, actions = recorded(Walk(0), {"kind": "absolute"}, "quaternion_wxyz", "euler_xyz")
    made = conversion(said, CanonicalConfig(rotation="rotation_6d"), states, actions)
    state = states[0].copy()
    state[-1] = 0.1
    assert made.learn_state(state)[-1] == pytest.approx(1.25)
    state[3:7] = 0
    with pytest.raises(
        UserError, match=r"state: rotation, dimensions 3-6, is .*expected quaternion_wxyz of length 1"
    ):
        made.learn_state(state)


LENIENT = Chosen(labels=WHERE_PRESENT)
FOLLOWS = ConventionsConfig.model_validate({"action": {"motion": {"kind": "absolute", "dimensions": "0-1"}}})


def toy_store(actions: bool) -> MappedStore:
    """Episode 1 lacks the state of its first step, and where not `actions` the action too."""
    arm, act = np.ones((5, 3), np.float32), np.full((5, 2), 0.5, np.float32)
    arm[0] = np.nan
    if not actions:
        act[0] = np.nan
    numbers: dict[tuple[str, int], np.ndarray] = {("obs/arm", 1): arm, ("act", 1): act}
    numbers |= {
        ("act", episode): np.full((length, 2), 0.5, np.float32) for episode, length in ((0, 6), (2, 7))
    }
    return MappedStore(ToyReader(numbers=numbers), Wanted(state=("obs/arm",)), (LENIENT,))


def test_actions_that_need_a_state_which_is_not_there_are_refused_or_masked() -> None:
    canonical = CanonicalConfig(actions="relative")
    with pytest.raises(UserError, match=r"motion does not fit episode 1, row 0[\s\S]*the state of each step"):
        apply(toy_store(actions=True), FOLLOWS, canonical)
    store = toy_store(actions=False)
    apply(store, FOLLOWS, canonical)
    normalizer = Normalizer.fit("standard", "arm", store.states[11:], store.actions[11:])
    frames = np.zeros((18, 2, 3, 8, 8), np.uint8)
    tokenizer = Tokenizer.fit({"open", "close"}, 512)
    index = WindowIndex([Source(store, frames)], horizon=3, normalizer=normalizer, tokenizer=tokenizer)
    actions, mask = index.chunks(np.array([0, 6, 7]))
    assert mask[:, :, 0].tolist() == [[True] * 3, [False] * 3, [True] * 3]
    assert bool(np.isfinite(actions.numpy()).all())
    assert store.converted is not None and store.converted.conversion.relative is not None
    rows = np.isfinite(store.actions).all(axis=1)
    found = np.concatenate([*chunks_of(store, store.episodes[1:2], rows, 3, 100)])
    assert found.shape == (3 + 3 + 2 + 1, 2)  # of the four steps that have a state
    np.testing.assert_allclose(found, [[-0.5, -0.5]] * 9)
