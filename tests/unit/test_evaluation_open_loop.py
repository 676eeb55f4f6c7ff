"""Open loop: the errors are masked means in both units, and the swap sees whether the text moves the
actions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tutti.data.normalize import Normalizer
from tutti.data.tokenize import Tokenizer
from tutti.evaluation.open_loop import OpenLoopResult, measure_open_loop, tasks_of
from tutti.models.config import ModelConfig
from tutti.models.vla import VLA
from tutti.suites.registry import find_suite
from tutti.types import Batch, DataSpec, Observation, UserError

TEXTS = ("close it", "open it", "please open it")
GROUPS = ("close", "open", "open")
TOKENIZER = Tokenizer.fit(TEXTS, 300)
SPEC = DataSpec(
    views=("a",),
    image_size=16,
    state_dim=2,
    action_dim=2,
    horizon=4,
    vocab_size=TOKENIZER.vocab_size,
    text_length=TOKENIZER.text_length,
    embodiments=("arm",),
    fps=20.0,
)


class TextModel(VLA):
    """Predicts `gain` times the first token's id where the text is heard, else 0."""

    def __init__(self, gain: float) -> None:
        vision = {"stem": {"channels": (8, 8, 8)}, "width": 8, "depth": 0, "heads": 1}
        small = {"width": 8, "depth": 1, "heads": 1}
        sizes = {"vision": vision, "language": small, "fusion": small, "action": {"hidden": 8}}
        built = ModelConfig.model_validate(sizes).build(SPEC)
        super().__init__(built.spec, built.vision, built.language, built.fusion, built.action)
        self.gain = gain

    def predict(self, observation: Observation) -> torch.Tensor:
        told = (observation.text * observation.text_mask).sum(1).float()
        return (self.gain * told)[:, None, None].expand(-1, 4, 2).clone()


def normalizer() -> Normalizer:
    actions = np.array([[-2.0, -5.0], [2.0, 5.0]], np.float32)
    return Normalizer.fit("standard", "arm", actions, actions)


def batch(ids: list[int], actions: torch.Tensor, mask: torch.Tensor) -> Batch:
    count = len(ids)
    text, text_mask = TOKENIZER.encode([TEXTS[i] for i in ids])
    observation = Observation(
        images=torch.zeros(count, 1, 3, 16, 16, dtype=torch.uint8),
        image_mask=torch.ones(count, 1, dtype=torch.bool),
        text=text,
        text_mask=text_mask,
        state=torch.zeros(count, 2),
        state_mask=torch.ones(count, dtype=torch.bool),
    )
    return Batch(
        observation=observation,
        actions=actions,
        action_mask=mask,
        instruction_id=torch.tensor(ids),
        embodiment=torch.zeros(count, dtype=torch.int64),
        window=torch.arange(count),
    )


def full(count: int, value: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((count, 4, 2), value), torch.ones(count, 4, 2, dtype=torch.bool)


def measure(model: TextModel, *batches: Batch, **more: Any) -> OpenLoopResult:
    return measure_open_loop(model, batches, normalizer(), TOKENIZER, TEXTS, **more)


def test_errors_are_masked_means_of_each_part() -> None:
    actions, mask = full(1, 0.0)
    actions[0, :, 0] = torch.tensor([1.0, 2.0, 3.0, 100.0])
    mask[0, 3] = False
    model = TextModel(0.0)
    model.train()
    found = measure(model, batch([0], actions, mask), actions_per_query=2)
    assert model.training, "the mode is restored"
    error = found.overall.normalised
    assert (error.first, error.executed, error.chunk) == pytest.approx((0.5, 0.75, 1.0))
    assert found.overall.data.chunk == pytest.approx(2.0), "dimension 0 has a standard deviation of 2"
    assert (found.chunk, found.executed) == (4, 2)


def test_parts_sum_over_batches_by_windows_and_groups_are_tasks_with_their_own_errors() -> None:
    found = measure(TextModel(0.0), batch([0], *full(1, 1.0)), batch([0, 0, 0], *full(3, 5.0)))
    assert (found.overall.normalised.chunk, found.overall.windows) == (pytest.approx(4.0), 4)
    actions, mask = full(3, 0.0)
    actions[1:] = 2.0
    found = measure(TextModel(0.0), batch([0, 1, 2], actions, mask), groups=GROUPS)
    own = [(g.name, g.windows, g.normalised.chunk) for g in found.groups]
    assert own == [("close", 1, 0.0), ("open", 2, 2.0)]


def test_a_deaf_model_has_swap_zero_and_a_listening_one_has_not() -> None:
    held = batch([0, 1, 2], *full(3, 1.0))
    deaf, hears = (measure(TextModel(gain), held, groups=GROUPS).overall.swap for gain in (0.0, 0.01))
    assert deaf == 0.0 and hears is not None and hears > 0.01


def test_swap_never_takes_a_paraphrase_of_the_same_task() -> None:
    told: list[str] = []

    class Spy(TextModel):
        def predict(self, observation: Observation) -> torch.Tensor:
            told.extend(TEXTS[i] for i in self.texts(observation))
            return super().predict(observation)

        def texts(self, observation: Observation) -> list[int]:
            known = TOKENIZER.encode(TEXTS)[0]
            return [int((known == row).all(1).nonzero()[0, 0]) for row in observation.text]

    measure(Spy(0.0), batch([0, 1, 2], *full(3, 1.0)), groups=GROUPS)
    assert told == [*TEXTS, "open it", "close it", "close it"]


def test_one_group_has_no_swap_and_no_window_is_an_error() -> None:
    assert measure(TextModel(0.1), batch([1, 2], *full(2, 1.0)), groups=("x",) * 3).overall.swap is None
    with pytest.raises(UserError, match="validation_fraction"):
        measure(TextModel(0.1))
    with pytest.raises(UserError, match="instruction_id 2 has no text"):
        measure_open_loop(TextModel(0.1), [batch([2], *full(1, 1.0))], normalizer(), TOKENIZER, TEXTS[:2])


@pytest.mark.parametrize("gain", [torch.nan, torch.inf])
def test_a_prediction_that_is_not_finite_is_no_error_but_refused(gain: float) -> None:
    hidden = torch.zeros(2, 4, 2, dtype=torch.bool)  # also where the mask would hide it
    with pytest.raises(UserError, match="predicts NaN or infinity for a held-out window"):
        measure(TextModel(gain), batch([0, 1], torch.zeros(2, 4, 2), hidden))


def test_tasks_of_the_suites_sentences() -> None:
    suite = find_suite("metaworld-8")
    texts = (suite.instructions("reach")[0], suite.instructions("faucet-open", "held_out")[1], "dance")
    assert tasks_of(texts, suite) == ("reach", "faucet-open", "dance")


def test_a_suite_is_asked_once_whatever_the_number_of_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    suite, asked = find_suite("metaworld-8"), list[tuple[Any, ...]]()

    def count(self: Any, *given: Any) -> Any:
        asked.append(given)
        return whole(self, *given)

    whole = type(suite).instructions
    monkeypatch.setattr(type(suite), "instructions", count)
    tasks_of(("dance",) * 1000, suite)
    assert len(asked) == len(set(asked)) == 2 * len(suite.tasks)
