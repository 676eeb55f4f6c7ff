"""Chunks become actions: each action is of its own step, whatever the delay, in the background or not."""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fixtures.line_world import LineWorlds, ListeningPolicy, Policies
from fixtures.small_decoders import build, features
from tutti.chunks import (
    ChunkRunner,
    Continuation,
    EnsembleConfig,
    QueueConfig,
    QueueRunner,
    RealTimeConfig,
    prefix_weights,
)
from tutti.evaluation.closed_loop.evaluate import evaluate
from tutti.evaluation.closed_loop.rollouts import PlannedRollout, RolloutSpec
from tutti.evaluation.config import ControlsConfig, EvaluationConfig
from tutti.models.decoders.denoising import DenoisingDecoder
from tutti.types import UserError


def run(
    runner: ChunkRunner, horizon: int, steps: int, seen: list[Continuation | None] | None = None
) -> np.ndarray:
    """The actions of a policy whose row i, asked for at step t, is (t + i, t): of which step, seen when."""
    actions: list[np.ndarray] = []
    for step in range(steps):

        def predict(continuing: Continuation | None, step: int = step) -> np.ndarray:
            if seen is not None:
                seen.append(continuing)
            return np.array([(step + row, step) for row in range(horizon)], np.float32)

        actions.append(runner.act(predict))
    return np.stack(actions)


@given(n=st.integers(1, 6), delay=st.integers(0, 6), spare=st.integers(0, 3))
def test_each_action_is_of_its_own_step_and_seen_as_long_before_as_the_delay_says(
    n: int, delay: int, spare: int
) -> None:
    delay = min(delay, n)
    runner, steps = QueueConfig(delay=delay).build(n), 4 * n + 3
    found = run(runner, n + delay + spare, steps)
    asked = [0 if step < n else step - step % n - delay for step in range(steps)]
    np.testing.assert_array_equal(found, np.array([range(steps), asked]).T)
    with ThreadPoolExecutor(1) as executor:
        background = QueueConfig(delay=delay).build(n, executor)
        np.testing.assert_array_equal(run(background, n + delay + spare, steps), found)
    runner.reset()
    assert runner.queries == 0
    np.testing.assert_array_equal(run(runner, n + delay + spare, steps), found)


def test_without_a_delay_a_short_chunk_is_executed_whole_and_with_one_it_is_an_error() -> None:
    assert run(QueueRunner(5), 3, 7)[:, 1].tolist() == [0, 0, 0, 3, 3, 3, 6]
    with pytest.raises(UserError, match="at most 3"):
        run(QueueRunner(2, 2), 3, 3)


def test_an_error_in_the_background_comes_with_the_step_that_needs_its_chunk() -> None:
    def fails(_: Continuation | None) -> np.ndarray:
        raise UserError("no picture")

    with ThreadPoolExecutor(1) as executor, pytest.raises(UserError, match="no picture"):
        QueueRunner(2, 1, executor=executor).act(fails)


def test_a_chunk_that_is_asked_for_again_after_an_error_begins_with_its_first_row() -> None:
    """No step has passed since it was looked for: with its first rows dropped the robot would skip them."""
    asked: list[Continuation | None] = []

    def predict(continuing: Continuation | None) -> np.ndarray:
        asked.append(continuing)
        if len(asked) == 2:
            raise UserError("no picture")
        return np.array([(len(asked), row) for row in range(3)], np.float32)

    with ThreadPoolExecutor(1) as executor:
        runner = RealTimeConfig(delay=1).build(2, executor)
        done = [runner.act(predict) for _ in range(2)]  # the second chunk is asked for, and fails
        with pytest.raises(UserError, match="no picture"):
            runner.act(predict)
        done += [runner.act(predict) for _ in range(3)]
    np.testing.assert_array_equal(done, [(1, 0), (1, 1), (3, 0), (3, 1), (4, 1)])


def test_a_chunk_of_which_nothing_is_left_binds_nothing() -> None:
    seen: list[Continuation | None] = []
    found = run(RealTimeConfig(delay=0).build(4), 4, 9, seen)
    assert found[:, 0].tolist() == [*range(9)] and seen == [None] * 3


def test_ensemble_is_the_weighted_mean_of_all_chunks_that_cover_the_step() -> None:
    horizon, decay, random = 4, 0.3, np.random.default_rng(0)
    chunks = random.normal(size=(9, horizon, 2)).astype(np.float32)
    runner = EnsembleConfig(decay=decay).build(1)
    for step in range(9):
        starts = range(max(0, step - horizon + 1), step + 1)
        weights = [math.exp(-decay * number) for number in range(len(starts))]  # the oldest weighs most
        rows = [chunks[start, step - start].astype(float) for start in starts]
        found = runner.act(lambda _, step=step: chunks[step])
        np.testing.assert_allclose(found, np.average(rows, axis=0, weights=weights), rtol=1e-5)
        if step == 0:
            np.testing.assert_array_equal(found, chunks[0, 0])


def test_a_new_chunk_is_told_what_the_old_one_does_at_its_steps_and_how_much_that_binds_it() -> None:
    seen: list[Continuation | None] = []
    run(RealTimeConfig(delay=2, guidance=7).build(3), 8, 10, seen)
    assert seen[0] is None
    for told, start in zip(seen[1:], (1, 4, 7), strict=True):
        assert told is not None and told.guidance == 7
        np.testing.assert_array_equal(told.weights, prefix_weights(8, 3, 2))
        bound = told.weights > 0
        np.testing.assert_array_equal(told.actions[bound, 0], start + np.arange(8)[bound])
    # E = 5: 1 for the delay, then c (e^c - 1) / (e - 1) with c = 3/4, 2/4, 1/4, then 0
    soft = [c * (math.e**c - 1) / (math.e - 1) for c in (0.75, 0.5, 0.25)]
    np.testing.assert_allclose(prefix_weights(8, 3, 2), [1, 1, *soft, 0, 0, 0], rtol=1e-6)


@pytest.fixture(scope="module")
def flow() -> DenoisingDecoder:
    built = build("flow", steps=4, cross_attention=True).eval()
    assert isinstance(built, DenoisingDecoder)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return built


def test_flow_goes_on_from_a_chunk_as_the_paper_says_and_without_weights_as_ever(
    flow: DenoisingDecoder,
) -> None:
    seen, target = features(), torch.linspace(-1, 1, 15).view(5, 3)
    weights = torch.tensor([1.0, 0.6, 0.2, 0, 0])
    with torch.inference_mode():
        free = flow.predict(seen)
        torch.testing.assert_close(
            flow.predict_continuing(seen, target, 0 * weights, 10.0), free, rtol=0, atol=0
        )
        found = flow.predict_continuing(seen, target, weights, 3.0)
    condition, chunk = flow.conditioning(seen), flow.noise.expand(len(free), -1, -1)
    for u in (0.0, 0.25, 0.5, 0.75):

        def clean(x: torch.Tensor, u: float = u) -> torch.Tensor:
            return x + (1 - u) * flow.denoised(x, u, condition)

        guess, pull = torch.func.vjp(clean, chunk)
        (pulled,) = pull(torch.diag(weights) @ (target - guess))
        factor = 3.0 if u == 0 else min(3.0, (1 - u) / u * (u**2 + (1 - u) ** 2) / (1 - u) ** 2)
        chunk = chunk + (flow.denoised(chunk, u, condition) + factor * pulled) / 4
    torch.testing.assert_close(found, chunk.detach(), rtol=1e-5, atol=1e-5)
    assert (found - target)[:, 0].abs().mean() < 0.5 * (free - target)[:, 0].abs().mean()


def test_other_decoders_say_that_they_cannot_go_on() -> None:
    with pytest.raises(UserError, match=r"needs the flow decoder; .* RegressionDecoder"):
        build("regression").predict_continuing(features(), torch.zeros(5, 3), torch.ones(5), 1.0)


class Ramp(ListeningPolicy):
    """A chunk of five that goes on more slowly, and with what it is told to go on from."""

    def predict(self, *seen: object, continuing: Continuation | None = None, **more: bool) -> np.ndarray:
        whole = super().predict(*seen, **more)[:1] * np.linspace(0.5, 0.1, 5, dtype=np.float32)[:, None]  # type: ignore[arg-type]
        if continuing is None:
            return whole
        return np.where(continuing.weights[:, None] == 1, continuing.actions, whole)


CONFIG = EvaluationConfig(
    tasks=("left",), episodes=2, actions_per_query=2, max_decisions=12, workers=1, controls=ControlsConfig()
)


@pytest.mark.parametrize(
    ("chunks", "n", "first", "said"),
    [
        ({}, 2, [0.5, 0.4, 0.5, 0.4, 0.5], ""),
        ({"kind": "queue", "delay": 1}, 2, [0.5, 0.4, 0.4, 0.3, 0.4], "queue, delay 1"),
        ({"kind": "ensemble", "decay": 0}, 1, [0.5, 0.45, 0.4, 0.35, 0.3], "ensemble, decay 0"),
        ({"kind": "real_time"}, 2, [0.5, 0.4, 0.4, 0.3, 0.4], "real-time chunking, delay 1, guidance 10"),
    ],
)
def test_rollouts_execute_chunks_as_the_config_says_and_the_protocol_tells(
    chunks: dict[str, object], n: int, first: list[float], said: str
) -> None:
    values = CONFIG.model_dump() | {"actions_per_query": n, "chunks": chunks or CONFIG.chunks}
    result = evaluate(Policies(Ramp), EvaluationConfig.model_validate(values), LineWorlds())
    actions = next(one.actions for one in result.rollouts if one.condition == "policy")
    np.testing.assert_allclose(-actions[:5, 0], first, rtol=1e-6)
    assert result.protocol.chunks == (said or "queue") and result.protocol.executed == n
    assert (f"executed ({said})" if said else f"{n} executed, at most") in result.notes()[0]


def test_another_way_to_execute_is_another_rollout_and_the_default_the_one_of_before() -> None:
    spec = RolloutSpec(
        policy=Policies(), environments=LineWorlds(), actions_per_query=2, max_decisions=12, folder=None
    )
    one = PlannedRollout("policy", "left", 3, "go left")
    parts = ["line world 1", "left", "policy", "3", "12", "weights 1", "go left", "2"]
    assert spec.identity(one) == hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    delayed = replace(spec, chunks=QueueConfig(delay=1))
    assert delayed.identity(one) != spec.identity(one)
    noop = one._replace(condition="noop")
    assert delayed.identity(noop) == spec.identity(noop)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"chunks": {"kind": "ensemble"}}, "actions_per_query is 4. Set actions_per_query to 1"),
        ({"chunks": {"kind": "queue", "delay": 5}}, "chunks.delay is 5, but a new chunk .* every 4 steps"),
        ({"chunks": {"kind": "real_time", "guidance": 0}}, "greater than 0"),
    ],
)
def test_what_does_not_fit_is_refused_when_the_config_is_read(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        EvaluationConfig.model_validate(wrong)
