"""The state term: which states it is asked for, its mask, its baseline, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tutti.objectives.state import FutureStatesConfig, FutureStatesTerm
from tutti.objectives.term import Model
from tutti.types import Batch, DataSpec, Features, Observation, Tokens, UserError

SPEC = DataSpec(
    views=("a",),
    image_size=2,
    state_dim=2,
    action_dim=1,
    horizon=1,
    vocab_size=4,
    text_length=1,
    embodiments=("x",),
    fps=20.0,
)


@dataclass
class Sizes:
    width: int = 6
    tokens_per_view: int = 1


def term_of(**config: Any) -> FutureStatesTerm:
    torch.manual_seed(0)
    model = SimpleNamespace(spec=SPEC, vision=Sizes(), language=Sizes(), fusion=Sizes(), action=None)
    return FutureStatesConfig(**{"offsets": (1, 3), **config}).build(cast("Model", model)).double()


def scene(b: int = 3) -> tuple[Features, Batch]:
    random = torch.Generator().manual_seed(1)
    tokens = Tokens(values=torch.zeros(b, 1, 6, dtype=torch.float64), mask=torch.ones(b, 1, dtype=torch.bool))
    readout = torch.randn(b, 6, dtype=torch.float64, generator=random)
    features = Features(vision=tokens, language=tokens, readout=readout, fused_vision=tokens)
    observation = Observation(
        images=torch.zeros(b, 1, 3, 2, 2, dtype=torch.uint8),
        image_mask=torch.ones(b, 1, dtype=torch.bool),
        text=torch.zeros(b, 1, dtype=torch.int64),
        text_mask=torch.ones(b, 1, dtype=torch.bool),
        state=torch.randn(b, 2, dtype=torch.float64, generator=random),
    )
    ids = torch.arange(b)
    batch = Batch(
        observation=observation,
        actions=torch.zeros(b, 1, 1, dtype=torch.float64),
        action_mask=torch.ones(b, 1, 1, dtype=torch.bool),
        instruction_id=ids,
        embodiment=torch.zeros_like(ids),
        window=ids,
        future_states=torch.randn(b, 4, 2, dtype=torch.float64, generator=random),
        future_states_mask=torch.tensor([[True, True, True, True]] + [[True, False, True, True]] * (b - 1)),
    )
    return features, batch


def test_it_asks_for_its_offsets_and_the_last_state() -> None:
    assert term_of().needs_states == (1, 3, 0, -1)
    assert term_of(last=False, key=False).needs_states == (1, 3)


def test_value_is_the_masked_mean_of_absolute_errors() -> None:
    term = term_of()
    features, batch = scene()
    assert batch.future_states is not None and batch.future_states_mask is not None
    errors = (term.predict(features.readout) - batch.future_states).abs().detach().numpy()
    kept = errors[:, :3][batch.future_states_mask.numpy()[:, :3]]
    expected = float(np.mean(kept) + np.mean(errors[:, 3]))
    result = term(features, batch)
    assert result.value.item() == pytest.approx(expected, rel=1e-12)
    assert result.metrics["state/key_l1"].item() == pytest.approx(float(np.mean(errors[:, 3])), rel=1e-12)


def test_masked_offsets_never_count_even_if_they_are_nan() -> None:
    term = term_of()
    features, batch = scene()
    assert batch.future_states is not None
    spoiled = batch.future_states.clone()
    spoiled[1:, 1] = float("nan")
    clean, dirty = term(features, batch), term(features, replace(batch, future_states=spoiled))
    assert dirty.value.item() == clean.value.item()
    dirty.value.backward()
    assert all(torch.isfinite(p.grad).all() for p in term.parameters() if p.grad is not None)


def test_the_baseline_is_the_loss_of_a_hand_that_stays() -> None:
    features, batch = scene()
    held = batch.observation.state[:, None].expand(-1, 4, -1).contiguous()
    metrics = term_of()(features, replace(batch, future_states=held)).metrics
    assert metrics["state/hold_baseline"].item() == 0
    assert term_of()(features, batch).metrics["state/hold_baseline"].item() > 0


def test_a_batch_without_states_is_refused_with_the_cure() -> None:
    features, batch = scene()
    with pytest.raises(UserError, match="state_offsets"):
        term_of()(features, replace(batch, future_states=None, future_states_mask=None))


def test_offsets_must_rise() -> None:
    with pytest.raises(ValidationError, match="must rise"):
        FutureStatesConfig(offsets=(3, 1))
