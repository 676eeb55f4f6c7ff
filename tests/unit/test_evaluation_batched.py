"""Many episodes through one call of the policy: rollout for rollout those of the loop over one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from fixtures import squares_data, squares_world
from fixtures.line_world import LineWorlds, ListeningPolicy, Policies
from tutti import pipeline
from tutti.evaluation.closed_loop.evaluate import evaluate
from tutti.evaluation.closed_loop.results import EvaluationResult
from tutti.evaluation.closed_loop.rollouts import RolloutPolicy
from tutti.evaluation.config import ControlsConfig, EvaluationConfig
from tutti.serving.factory import CheckpointPolicyFactory
from tutti.suites.environment import Suite
from tutti.types import History, UserError

CONTROLS = ControlsConfig(expert=2, noop=2, no_image=3, wrong_instruction=4)


class Wavering(ListeningPolicy):
    """Goes where the text says, in a chunk of 4 that depends on the state; counts its calls."""

    calls: list[int]

    def predict(
        self,
        images: Mapping[str, np.ndarray] | None,
        state: np.ndarray,
        instruction: str,
        use_images: bool = True,
    ) -> np.ndarray:
        chunk = super().predict(images, state, instruction, use_images)[0, 0]
        waves = np.sin(7 * state[0] + np.arange(4))[:, None]
        return (chunk * (0.4 + 0.3 * waves)).astype(np.float32)

    def predict_many(
        self,
        observations: Sequence[tuple[Any, Any, str]],
        histories: Sequence[History] = (),
        use_images: bool | Sequence[bool] = True,
    ) -> list[np.ndarray | UserError]:
        assert not histories and not isinstance(use_images, bool)
        type(self).calls.append(len(observations))
        return [self.predict(*one, look) for one, look in zip(observations, use_images, strict=True)]

    def for_another_robot(self) -> Self:
        return self


class Dying(Wavering):
    """Fails at its ninth call, as an interruption would."""

    def action(self, instruction: str, looks: bool) -> float:
        if len(self.calls) == 9:
            raise UserError("the power went out")
        return super().action(instruction, looks)


@dataclass(frozen=True)
class Many:
    kind: type[Wavering] = Wavering
    fingerprint: str = "weights 1"

    def __call__(self) -> RolloutPolicy:
        self.kind.calls = []
        policy: Any = self.kind()
        return policy


def config(**changes: Any) -> EvaluationConfig:
    values = {"episodes": 5, "actions_per_query": 2, "max_decisions": 11, "workers": 1, "controls": CONTROLS}
    return EvaluationConfig.model_validate(values | changes)


def told(result: EvaluationResult) -> list[dict[str, Any]]:
    """All of each rollout but the hash of the settings."""
    return [json.loads(one.to_json()) | {"identity": ""} for one in result.rollouts]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"chunks": {"kind": "queue", "delay": 2}},  # two chunks of the first step
        {"chunks": {"kind": "ensemble"}, "actions_per_query": 1},
        {"sentences": "train", "workers": 2, "controls": {"expert": 0, "noop": 0}},
    ],
)
def test_the_rollouts_are_those_of_one_by_one(changes: dict[str, Any]) -> None:
    alone = evaluate(Many(), config(**changes | {"workers": 1}), LineWorlds())
    many = evaluate(Many(), config(batch_size=4, **changes), LineWorlds())
    assert told(many) == told(alone)
    assert set(Wavering.calls) == {4}, "each pass has as many rows"
    assert {one.success for one in many.rollouts if one.condition == "policy"} == {True, False}


def test_what_was_interrupted_goes_on_and_more_episodes_extend_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="power"):
        evaluate(Many(Dying), config(batch_size=3), LineWorlds(), folder=tmp_path)
    kept = len(list(tmp_path.rglob("*.json")))
    assert 3 <= kept < 20, "each is saved as it ends"
    whole = evaluate(Many(), config(batch_size=3), LineWorlds(), folder=tmp_path)
    assert whole.resumed == kept
    assert told(whole) == told(evaluate(Many(), config(), LineWorlds()))
    more = evaluate(Many(), config(batch_size=3, episodes=8), LineWorlds(), folder=tmp_path)
    assert more.resumed == len(whole.rollouts)
    assert told(more) == told(evaluate(Many(), config(episodes=8), LineWorlds()))


def test_what_cannot_be_batched_is_refused() -> None:
    with pytest.raises(UserError, match=r"ListeningPolicy predicts for one episode at a time\. Set"):
        evaluate(Policies(), config(batch_size=4), LineWorlds())
    with pytest.raises(ValueError, match=r"batch_size above 1 with chunks\.kind real_time"):
        config(batch_size=2, chunks={"kind": "real_time"})


class Near(squares_world.Squares):
    """A policy of few updates comes as near as this, now and then."""

    def step(self, action: np.ndarray) -> None:
        super().step(action)
        self.solved |= bool(np.abs(self.squares[self.task] - self.hand).max() < 0.7)


class NearSuite(squares_world.SquaresSuite):
    def make(self, task: str, image_size: int | None = None, samples: int = 0) -> Near:
        return Near(task)


@pytest.mark.parametrize("history", [[0], [-2, 0]])
def test_a_policy_acts_as_one_by_one_within_2e_7(history: list[int], tmp_path: Path) -> None:
    """With a history it looks at every step, at what its own episode has shown alone."""
    squares_data.write(tmp_path / "data", squares_data.episodes(8))
    training = squares_data.TRAINING | {"steps": 12, "ema": 0.5, "optimizer": {"lr": 0.01}}
    data = {"batch_size": 8, "image_size": 16, "validation_fraction": 0.3, "history": history}
    made = squares_data.config(tmp_path / "data", data=data, model=squares_data.MODEL, training=training)
    pipeline.train(made, tmp_path / "run")
    policy = CheckpointPolicyFactory(tmp_path / "run")
    settings = config(max_decisions=30, controls=CONTROLS)
    suite: Suite = NearSuite()
    alone = evaluate(policy, settings, suite)
    many = evaluate(policy, settings.model_copy(update={"batch_size": 4}), suite)
    for one, other in zip(alone.rollouts, many.rollouts, strict=True):
        assert (one.success, one.start, one.queries) == (other.success, other.start, other.queries)
        np.testing.assert_allclose(one.actions, other.actions, rtol=0, atol=2e-7 * 4)
    own = [one for one in alone.rollouts if one.condition == "policy"]
    assert {one.success for one in own} == {True, False}
    assert len({one.actions.tobytes() for one in own}) == len(own)
