"""One front door: what known clients send is the same observation; a robot's loop takes three lines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_serving_policy import CONFIG, SPEC, TOKENIZER, look, model, normalizer

from tutti.chunks import Continuation, EnsembleConfig, QueueConfig
from tutti.models.config import ModelConfig
from tutti.serving.actor import Actor
from tutti.serving.front_door import FrontDoor
from tutti.serving.policy import Policy
from tutti.types import UserError

PICTURE, OTHER = np.zeros((4, 6, 3), np.uint8), np.ones((3, 5, 5), np.float32)
JOINTS, GRIPPER = np.arange(7.0), np.array([0.5])


def spec(views: tuple[str, ...], state: int) -> Any:
    return replace(SPEC, views=views, state_dim=state)


CLIENTS = {
    "libero": (
        spec(("observation.images.agentview", "observation.images.eye_in_hand"), 8),
        {"observation/image": PICTURE, "observation/wrist_image": OTHER},
        {"observation/state": np.arange(8.0), "prompt": "open the tap"},
    ),
    "droid": (
        spec(("exterior_image_1_left", "wrist_image_left"), 8),
        {"observation/exterior_image_1_left": PICTURE, "observation/wrist_image_left": OTHER},
        {
            "observation/gripper_position": GRIPPER,
            "observation/joint_position": JOINTS,
            "prompt": b"open the tap",
        },
    ),
    "aloha": (
        spec(("observation.images.cam_high", "observation.images.cam_left_wrist"), 7),
        {"images": {"cam_high": PICTURE, "cam_left_wrist": OTHER, "cam_low": PICTURE}},
        {"state": JOINTS},
    ),
    "simpler": (
        spec(("observation.images.image_0",), 7),
        {"observation/primary_image": PICTURE},
        {"observation/state": JOINTS, "prompt": np.array("open the tap")},
    ),
    "lerobot": (
        spec(("front", "wrist"), 7),
        {"observation.images.front": PICTURE, "observation.images.wrist": OTHER},
        {"observation.state": JOINTS, "task": "open the tap"},
    ),
}


@pytest.mark.parametrize("client", CLIENTS)
def test_what_each_client_sends_is_found(client: str) -> None:
    known, images, rest = CLIENTS[client]
    seen = FrontDoor(known, instruction="open the tap")({**images, **rest, "session": 3})
    assert set(seen.images) == set(known.views)
    assert [seen.images[view] is one for view, one in zip(known.views, (PICTURE, OTHER), strict=False)] == [
        True
    ] * len(known.views)
    expected = [*JOINTS, 0.5] if client == "droid" else range(known.state_dim)
    np.testing.assert_array_equal(seen.state, expected)  # type: ignore[arg-type]
    assert seen.instruction == "open the tap"


def test_other_names_are_said_and_state_may_go_by_the_names_of_its_dimensions() -> None:
    names = {"cam/0": "right", "cam/1": "left", "text": "instruction", "arm/q": "state", "grip": "state"}
    given = {"cam": {"0": PICTURE, "1": OTHER}, "text": "go", "grip": 2.0, "arm": {"q": [0.0, 1.0]}}
    seen = FrontDoor(SPEC, names)(given)
    assert seen.images == {"right": PICTURE, "left": OTHER} and seen.instruction == "go"
    np.testing.assert_array_equal(seen.state, [0, 1, 2])  # type: ignore[arg-type]
    named = {"right": PICTURE, "left": OTHER, "state": {"x": 1.0, "y": 2.0}, "prompt": "go"}
    assert FrontDoor(SPEC)(named).state == {"x": 1.0, "y": 2.0}
    assert FrontDoor(replace(SPEC, state_dim=0))({**named, "state": None}).state is None
    arms = replace(SPEC, state_names=("left/q", "left.grip", "right/q"))
    told = {"left": {"q": 1.0, "grip": 2.0}, "right/q": 3.0}
    assert FrontDoor(arms)({**GOOD, "state": told}).state == dict(
        zip(arms.state_names, (1, 2, 3), strict=True)
    )
    assert FrontDoor(SPEC, instruction="go")({**GOOD, "prompt": None}).instruction == "go"
    with pytest.raises(
        UserError, match=r"names: 'cam' is said to be 'rigt'; expected .* Did you mean 'right'\?"
    ):
        FrontDoor(SPEC, {"cam": "rigt"})


GOOD = {"images": {"right": PICTURE, "left": OTHER}, "state": np.zeros(3), "prompt": "go"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"images": {"right": PICTURE}}, "the view left is missing; found images.right, state, prompt"),
        ({"images/right": PICTURE}, "'images.right' is given twice"),
        ({"right": PICTURE}, "'right' is the view right, which is given twice"),
        ({"state": None, "images": {1: PICTURE}}, "expected names, found the key 1"),
        ({"prompt": 3}, "expected a sentence, got int"),
        ({"prompt": None}, "expected prompt or task or instruction, or a default"),
    ],
)
def test_what_is_missing_or_wrong_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        FrontDoor(SPEC)({**GOOD, **change})
    for key, expected in (("state", "state: expected observation.state or state"), ("prompt", "a default")):
        with pytest.raises(UserError, match=expected):
            FrontDoor(SPEC)({name: value for name, value in GOOD.items() if name != key})
    # Two views of the scene: a client's picture of the scene might be either.
    with pytest.raises(UserError, match="the view right, left is missing"):
        FrontDoor(SPEC)({"observation/image": PICTURE, "state": np.zeros(3), "prompt": "go"})


def test_names_of_maps_in_maps_are_bounded() -> None:
    """Each name holds all before it: a message of 16 MiB of long ones, 250 deep, would take 2 GiB."""
    deep: dict[str, Any] = {}
    for _ in range(250):
        deep = {"a": 0, "k" * 1000: deep}
    with pytest.raises(UserError, match="names of at most 256 characters, found 'kkk") as caught:
        FrontDoor(SPEC)({**GOOD, "more": 0, **deep})
    assert len(str(caught.value)) < 300


def test_a_state_in_parts_is_never_cut_to_those_that_are_numbers() -> None:
    """Seven joints, and a gripper that says "open": a policy of seven numbers would take the joints alone."""
    known, images, rest = CLIENTS["droid"]
    with pytest.raises(
        UserError, match=r"state: observation\.gripper_position: expected numbers .* str 'open'"
    ):
        FrontDoor(replace(known, state_dim=7))({**images, **rest, "observation/gripper_position": "open"})


class Fails:
    """A policy of one robot that fails at its second prediction, and notes when it looked."""

    spec = replace(SPEC, state_dim=2, state_names=("x", "y"), fps=10.0)

    def __init__(self) -> None:
        self.times: list[float] = []
        self.states: list[Any] = []

    def reset(self) -> None: ...

    def observe(self, images: Any, state: Any, time: float) -> None:
        self.times.append(time)

    def predict(self, images: Any, state: Any, *_: Any, **__: Any) -> np.ndarray:
        self.states.append(state)
        if len(self.states) == 2:
            raise UserError("no picture")
        return np.zeros((2, 1), np.float32)


def test_a_step_that_failed_is_the_same_step_again_and_a_state_by_names_is_read_at_once() -> None:
    policy, joints = Fails(), np.zeros((2, 1))
    given = {"images": {"right": PICTURE, "left": OTHER}, "state": dict(zip("xy", joints, strict=True))}
    with Actor(policy, FrontDoor(policy.spec, instruction="go"), 1, QueueConfig(), background=True) as actor:
        actor.act(given)
        with pytest.raises(UserError, match="no picture"):
            actor.act(given)
        joints += 7  # the robot writes its joints into the same array
        actor.act(given)
    assert policy.times == [0, 0.1, 0.1]
    assert [one["x"].tolist() for one in policy.states] == [[0], [0], [7]]


def observation(seed: int) -> dict[str, Any]:
    images, state = look(seed)
    return {"images": images, "state": state, "prompt": "open the tap"}


def test_a_policy_acts_its_chunks_in_a_loop_of_three_lines() -> None:
    policy = Policy(model(), normalizer(), TOKENIZER)
    chunks = [policy.predict(*look(seed), "open the tap") for seed in range(6)]
    for _ in range(2):
        done = [policy.act(observation(seed)) for seed in range(6)]
        np.testing.assert_array_equal(done, [chunks[seed // 2 * 2][seed % 2] for seed in range(6)])
        policy.reset()
    with policy.actor(2, QueueConfig(delay=1), background=True) as actor:
        buffer = observation(0)
        found: list[np.ndarray] = []
        for seed in range(5):
            for view, picture in observation(seed)["images"].items():
                buffer["images"][view][:] = picture  # a camera that writes into the same array
            buffer["state"][:] = look(seed)[1]
            found.append(actor.act(buffer))
    late = [chunks[0][0], chunks[0][1], chunks[1][1], chunks[1][2], chunks[3][1]]
    np.testing.assert_array_equal(found, late)
    with pytest.raises(UserError, match="only queue and real_time compute in the background"):
        policy.actor(1, EnsembleConfig(), background=True)


def test_real_time_chunks_keep_the_first_actions_of_the_one_before_in_data_units() -> None:
    config = ModelConfig.model_validate(
        {
            "vision": {"stem": {"channels": (8, 8, 8)}, "width": 8, "depth": 1, "heads": 1},
            "language": {"width": 8, "depth": 1, "heads": 1},
            "fusion": {"width": 8, "depth": 1, "heads": 1},
            "action": {"kind": "flow", "width": 8, "depth": 1, "heads": 1},
        }
    )
    policy = Policy(model(config=config), normalizer(), TOKENIZER, clip=False)
    before = policy.predict(*look(1), "open the tap") + np.float32(1)
    weights = np.array([1, 1, 0, 0], np.float32)
    told = Continuation(actions=before, weights=weights, guidance=10.0)
    free = policy.predict(*look(2), "close the tap")
    bound = policy.predict(*look(2), "close the tap", continuing=told)
    assert np.abs(bound - before)[:2].max() < 0.1 * np.abs(free - before)[:2].max()


def test_a_batch_of_robots_gives_each_its_chunk_and_each_mistake_to_the_one_who_made_it() -> None:
    policy = Policy(model(), normalizer(), TOKENIZER)
    given: list[Any] = [(*look(seed), text) for seed, text in ((1, "open the tap"), (2, "close the tap"))]
    wrong: Any = (look(3)[0], np.zeros(2), "open the tap")
    first, error, second = policy.predict_many([given[0], wrong, given[1]])
    assert isinstance(error, UserError) and "expected 3 numbers" in str(error)
    for found, one in ((first, given[0]), (second, given[1])):
        assert isinstance(found, np.ndarray)
        np.testing.assert_allclose(found, policy.predict(*one), rtol=2e-6, atol=2e-6)
    (alone,) = policy.predict_many([given[0]])
    np.testing.assert_array_equal(alone, policy.predict(*given[0]))  # type: ignore[arg-type]
    assert policy.predict_many([]) == []
    # Where every token of a text is kept, a long one has more of them than its neighbour in the batch.
    every = CONFIG.model_copy(update={"language": CONFIG.language.model_copy(update={"num_tokens": 0})})
    policy = Policy(model(config=every), normalizer(), TOKENIZER, warn=False)
    given[1] = (*look(2), "close the tap that is at the left of the sink")
    for found, one in zip(policy.predict_many(given), given, strict=True):
        np.testing.assert_allclose(found, policy.predict(*one), rtol=2e-6, atol=2e-6)  # type: ignore[arg-type]
    tall: Any = ({**look(1)[0], "left": np.zeros((9000, 1, 3), np.uint8)}, look(1)[1], "open the tap")
    assert "more than 8192 pixels along an edge" in str(policy.predict_many([tall])[0])
