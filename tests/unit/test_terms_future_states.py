"""The state term: which states it is asked for, its mask, its baseline, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from fixtures.term_batches import NO_MODEL, make_batch, make_loss, make_model
from tutti.gripper_dims import gripper_dimensions
from tutti.objectives.config import ObjectiveConfig
from tutti.objectives.term import Model, Term, TermValue
from tutti.objectives.terms.states import FutureStatesConfig, FutureStatesTerm
from tutti.types import (
    Batch,
    DataNeeds,
    DataSpec,
    Features,
    LaterStates,
    Observation,
    StateLabel,
    Tokens,
    UserError,
)

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

    def __call__(self, images: Tensor, image_mask: Tensor) -> Tokens:
        raise AssertionError("this term looks at no picture of its own")


def term_of(**config: Any) -> FutureStatesTerm:
    torch.manual_seed(0)
    model = SimpleNamespace(
        spec=SPEC,
        vision=Sizes(),
        language=Sizes(),
        fusion=Sizes(),
        action=None,
        prepare=lambda images: images,
    )
    given = {"offsets": (1, 3), "gripper": {"dimension": 0}, **config}
    return FutureStatesConfig.model_validate(given).build(cast("Model", model), "state").double()


def needs_of(**config: Any) -> DataNeeds:
    given = {"offsets": (1, 3), "gripper": {"dimension": 0}, **config}
    return FutureStatesConfig.model_validate(given).needs("state")


def objective_of(**terms: Any) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate({"align": None, "recon": None, "state": None, **terms})


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
        later_states=LaterStates(
            labels=(1, 3, "last", "next_key"),
            values=torch.randn(b, 4, 2, dtype=torch.float64, generator=random),
            mask=torch.tensor([[True, True, True, True]] + [[True, False, True, True]] * (b - 1)),
        ),
    )
    return features, batch


def states_of(batch: Batch) -> LaterStates:
    assert batch.later_states is not None
    return batch.later_states


def test_it_asks_for_its_offsets_and_the_last_state() -> None:
    assert needs_of().states == (1, 3, "last", "next_key")
    assert needs_of(last=False, gripper="off").states == (1, 3)


def test_without_a_gripper_every_offset_counts() -> None:
    term, (features, batch) = term_of(gripper="off"), scene()
    later = states_of(batch)
    batch = replace(
        batch,
        later_states=LaterStates(labels=(1, 3, "last"), values=later.values[:, :3], mask=later.mask[:, :3]),
    )
    errors = (term.predict(features.readout) - later.values[:, :3]).abs()
    kept = [errors[b, o] for b in range(3) for o in range(3) if later.mask[b, o]]
    assert term.compute(features, batch, NO_MODEL).value.item() == pytest.approx(
        torch.stack(kept).mean().item()
    )


def test_without_a_gripper_there_is_no_part_of_key_frames() -> None:
    term, needs = FutureStatesConfig().build(make_model(), "state"), FutureStatesConfig().needs("state")
    assert "next_key" not in needs.states and needs.grippers == () and not term.has_key


@pytest.mark.parametrize(
    ("dimension", "expected"), [(2, (2,)), (-1, (2,)), (0, (0,)), ([0, 2], (0, 2)), ([-1, 1], (1, 2))]
)
def test_the_grippers_reach_the_data_as_dimensions(dimension: Any, expected: tuple[int, ...]) -> None:
    needs = objective_of(state={"offsets": (1,), "gripper": {"dimension": dimension}}).needs()
    assert gripper_dimensions(needs.grippers, 3, "gripper.dimension") == expected


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        (3, r"objective\.state\.gripper\.dimension is 3, but actions have 3 dimensions: choose from 0 to 2"),
        ([0, -4], r"is -4, but actions have 3"),
        ([2, -1], r"names a dimension twice: 2, -1"),
    ],
)
def test_a_gripper_that_is_no_dimension_is_refused(dimension: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_loss(make_model(), state={"gripper": {"dimension": dimension}})


def test_terms_must_agree_on_the_gripper() -> None:
    one, other = ({"kind": "future_states", "gripper": {"dimension": place}} for place in (0, 1))
    with pytest.raises(UserError, match=r"objective\.state: \[0\], objective\.soon: \[1\]"):
        objective_of(state=one, soon=other).needs()
    assert objective_of(state=one, soon={**other, "gripper": "off"}).needs().grippers == (0,)
    assert objective_of(state=one, soon={**other, "weight": 0.0}).needs().grippers == (0,)


def test_a_custom_term_that_wants_key_frames_names_a_gripper() -> None:
    mine = {"kind": f"{__name__}:Wanting", "options": {"grippers": ()}}
    with pytest.raises(UserError, match=r"objective\.mine needs the states at the next key frames"):
        objective_of(mine=mine).needs()
    assert objective_of(mine={**mine, "options": {"grippers": (2,)}}).needs().grippers == (2,)


class Wanting(Term):
    @classmethod
    def needs(cls, *, grippers: tuple[int, ...]) -> DataNeeds:
        return DataNeeds(states=("next_key",), grippers=grippers)

    def compute(self, features: Features, batch: Batch, model: Model) -> TermValue:
        raise AssertionError("never computed")


@pytest.mark.parametrize(
    ("given", "gripper"),
    [
        ({"key": True}, {"dimension": -1}),
        ({"key": True, "gripper": "off"}, {"dimension": -1}),
        ({"key": True, "gripper": {"dimension": 2}}, {"dimension": 2}),
        ({"key": False, "gripper": {"dimension": 2}}, "off"),
    ],
)
def test_a_config_that_was_written_with_key_means_what_it_meant(given: dict[str, Any], gripper: Any) -> None:
    assert FutureStatesConfig.model_validate(given).model_dump()["gripper"] == gripper


def test_value_is_the_masked_mean_of_absolute_errors() -> None:
    term = term_of()
    features, batch = scene()
    later = states_of(batch)
    errors = (term.predict(features.readout) - later.values).abs().detach().numpy()
    kept = errors[:, :3][later.mask.numpy()[:, :3]]
    expected = float(np.mean(kept) + np.mean(errors[:, 3]))
    result = term(features, batch, NO_MODEL)
    assert result.value.item() == pytest.approx(expected, rel=1e-12)
    assert result.metrics["state/key_l1"].item() == pytest.approx(float(np.mean(errors[:, 3])), rel=1e-12)


def test_masked_offsets_never_count_even_if_they_are_nan() -> None:
    term = term_of()
    features, batch = scene()
    spoiled = states_of(batch).values.clone()
    spoiled[1:, 1] = float("nan")
    later = replace(states_of(batch), values=spoiled)
    clean, dirty = (
        term(features, batch, NO_MODEL),
        term(features, replace(batch, later_states=later), NO_MODEL),
    )
    assert dirty.value.item() == clean.value.item()
    dirty.value.backward()
    assert all(torch.isfinite(p.grad).all() for p in term.parameters() if p.grad is not None)


def test_the_baseline_is_the_loss_of_a_hand_that_stays() -> None:
    features, batch = scene()
    held = batch.observation.state[:, None].expand(-1, 4, -1).contiguous()
    metrics = term_of()(
        features, replace(batch, later_states=replace(states_of(batch), values=held)), NO_MODEL
    ).metrics
    assert metrics["state/hold_baseline"].item() == 0
    assert term_of()(features, batch, NO_MODEL).metrics["state/hold_baseline"].item() > 0


def test_it_finds_its_states_among_those_of_other_terms() -> None:
    term = term_of()
    features, batch = scene()
    later = states_of(batch)
    extra = torch.full((3, 1, 2), 9.0, dtype=torch.float64)
    more = LaterStates(
        labels=("next_key", "last", 1, 2, 3),
        values=torch.cat([later.values[:, [3, 2, 0]], extra, later.values[:, [1]]], dim=1),
        mask=torch.cat(
            [later.mask[:, [3, 2, 0]], torch.ones(3, 1, dtype=torch.bool), later.mask[:, [1]]], dim=1
        ),
    )
    assert (
        term(features, replace(batch, later_states=more), NO_MODEL).value
        == term(features, batch, NO_MODEL).value
    )


def test_a_batch_without_states_is_refused_with_the_cure() -> None:
    features, batch = scene()
    with pytest.raises(UserError, match="needs the states at"):
        term_of()(features, replace(batch, later_states=None), NO_MODEL)


def test_offsets_must_rise() -> None:
    with pytest.raises(ValidationError, match="must rise"):
        FutureStatesConfig(offsets=(3, 1))


def test_several_state_terms_share_a_batch_under_their_own_names() -> None:
    """Offsets overlap and differ, with and without key frame and end; other terms want states and futures."""
    model = make_model()
    small = {"kind": "future_states", "hidden": 16, "gripper": {"dimension": -1}}
    terms: dict[str, Any] = {
        "state": {**small, "offsets": (1, 4)},
        "soon": {**small, "offsets": (2,), "last": False, "gripper": "off"},
        "grasp": {**small, "offsets": (1, 5), "last": False},
        "recon": {"kind": "future_patches", "width": 16, "heads": 2, "offset": 3},
        "inverse": {"kind": "inverse_dynamics", "hidden": 16, "offset": 2},
    }
    loss = make_loss(model, **terms)
    needs = objective_of(**terms).needs()
    assert needs.states == (1, 2, 4, 5, "last", "next_key") and needs.futures == (2, 3)
    given = make_batch()
    features = model(given.observation)
    found = loss(features, given, model)
    wanted: dict[str, tuple[StateLabel, ...]] = {
        "state": (1, 4, "last", "next_key"),
        "soon": (2,),
        "grasp": (1, 5, "next_key"),
    }
    for name, labels in wanted.items():
        term = cast("FutureStatesTerm", loss.terms[name])
        alone = replace(given, later_states=states_of(given).at(labels), futures={})
        assert term.labels == labels
        assert torch.equal(found.values[name], term(features, alone, model).value)
        assert f"{name}/hold_baseline" in found.metrics
        assert (f"{name}/key_l1" in found.metrics) == ("next_key" in labels)
    assert len({value.item() for value in found.values.values()}) == len(found.values)
