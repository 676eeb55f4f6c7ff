"""The state-contrastive term: its formula, floor and chance, who is compared with whom, the view cut-off."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fixtures.term_batches import NO_MODEL, plain_batch, plain_features
from tutti.objectives.terms.state_contrastive import (
    StateContrastiveConfig,
    StateContrastiveTerm,
    soft_contrast,
    without_one_view,
)
from tutti.types import Batch, Features, Tokens


def term_of(width: int = 5, **config: Any) -> StateContrastiveTerm:
    torch.manual_seed(0)
    return StateContrastiveTerm(
        StateContrastiveConfig(width=7, **config), width, "state_contrastive"
    ).double()


def scene(b: int = 6, views: int = 2, per_view: int = 2) -> tuple[Features, Batch]:
    torch.manual_seed(1)
    vision = torch.randn(b, views * per_view, 5, dtype=torch.float64)
    readout = torch.randn(b, 5, dtype=torch.float64)
    state = torch.randn(b, 3, dtype=torch.float64)
    features = plain_features(vision, vision[:, :1], readout)
    return features, plain_batch(torch.arange(b), state=state, views=views)


def by_hand(z: Tensor, states: Tensor, robots: list[int], beta: float, tau: float) -> tuple[float, float]:
    """The loss and its floor, pair by pair."""
    loss, floor, rows = 0.0, 0.0, 0
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i and robots[j] == robots[i]]
        if len(others) < 2:
            continue
        near = [exp(-(states[i] - states[j]).norm().item() / beta) for j in others]
        alike = [exp(z[i].dot(z[j]).item() / tau) for j in others]
        q, p = [x / sum(near) for x in near], [x / sum(alike) for x in alike]
        loss -= sum(a * log(b) for a, b in zip(q, p, strict=True))
        floor -= sum(a * log(a) for a in q)
        rows += 1
    return loss / rows, floor / rows


def contrast(similarity: Tensor, states: Tensor, robots: list[int] | None = None, beta: float = 1.0) -> Any:
    b = len(states)
    embodiment = torch.tensor(robots or [0] * b)
    return soft_contrast(similarity, states, embodiment, torch.ones(b, dtype=torch.bool), beta)


def test_three_windows_by_hand() -> None:
    states = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    result = contrast(torch.zeros(3, 3, dtype=torch.float64), states)

    def entropy(x: float) -> float:
        p = 1 / (1 + exp(-x))
        return -p * log(p) - (1 - p) * log(1 - p)

    # |s_i - s_j| of the rows: (1, 3), (1, 2), (3, 2), so q is sigmoid(2), sigmoid(1), sigmoid(1) and the rest
    assert result.value.item() == pytest.approx(log(2), rel=1e-12)
    assert result.metrics["chance"].item() == pytest.approx(log(2), rel=1e-12)
    assert result.metrics["floor"].item() == pytest.approx((entropy(2) + 2 * entropy(1)) / 3, rel=1e-12)


def test_similarities_that_mirror_the_distances_attain_the_floor() -> None:
    torch.manual_seed(0)
    states = torch.randn(5, 3, dtype=torch.float64)
    similarity = -torch.cdist(states, states) / 0.3 + torch.randn(5, 1, dtype=torch.float64)
    result = contrast(similarity, states, beta=0.3)
    assert abs(result.metrics["above_floor"].item()) < 1e-12
    assert result.value.item() == pytest.approx(result.metrics["floor"].item(), rel=1e-12)


def test_only_windows_of_one_robot_are_compared() -> None:
    features, batch = scene(7)
    robots = [0, 1, 0, 0, 1, 1, 2]  # the last one is alone, and so no row
    term = term_of(temperature=0.4, state_scale=0.7)
    z = F.normalize(term.head(features.readout), dim=1)
    loss, floor = by_hand(z, batch.observation.state, robots, 0.7, 0.4)
    result = term(features, replace(batch, embodiment=torch.tensor(robots)), NO_MODEL)
    assert result.value.item() == pytest.approx(loss, rel=1e-12)
    assert result.metrics["state_contrastive/floor"].item() == pytest.approx(floor, rel=1e-12)
    assert result.metrics["state_contrastive/above_floor"].item() == pytest.approx(loss - floor, rel=1e-9)
    assert result.metrics["state_contrastive/chance"].item() == pytest.approx(log(2), rel=1e-12)


def test_the_view_cut_off_doubles_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    features, batch = scene()
    term = term_of(read="vision")
    draw = torch.tensor([[0.9, 0.1]] * 3 + [[0.1, 0.9]] * 3)  # drops view 0 of three windows, view 1 of three
    monkeypatch.setattr(torch, "rand", lambda *size, **_: draw)
    tokens = features.vision.values
    twin = torch.cat([tokens[:3, 2:].mean(1), tokens[3:, :2].mean(1)])
    z = F.normalize(term.head(torch.cat([tokens.mean(1), twin])), dim=1)
    states = batch.observation.state.repeat(2, 1)
    loss, floor = by_hand(z, states, [0] * 12, 0.5, 0.2)
    result = term(features, batch, NO_MODEL)
    assert result.value.item() == pytest.approx(loss, rel=1e-12)
    assert result.metrics["state_contrastive/floor"].item() == pytest.approx(floor, rel=1e-12)


def test_one_present_view_is_dropped_and_never_the_only_one() -> None:
    tokens = Tokens(values=torch.zeros(400, 6, 2), mask=torch.ones(400, 6, dtype=torch.bool))
    image_mask = torch.ones(400, 3, dtype=torch.bool)
    image_mask[:, 1] = False
    image_mask[300:, 2] = False
    tokens = replace(tokens, mask=image_mask.repeat_interleave(2, dim=1))
    torch.manual_seed(0)
    kept = without_one_view(tokens, image_mask).mask.view(400, 3, 2)
    assert torch.equal(kept[..., 0], kept[..., 1])
    assert torch.equal(kept[:300, :, 0].sum(1), torch.ones(300, dtype=torch.int64))
    assert not kept[:, 1].any() and not kept[300:].any()
    assert 100 < kept[:300, 0, 0].sum() < 200, "each of the two views must be dropped about as often"


def test_a_single_camera_has_no_twins_and_still_trains() -> None:
    features, batch = scene(views=1)
    cut, plain = (
        term_of(read="vision", drop_one_view=cut)(features, batch, NO_MODEL).value.item()
        for cut in (True, False)
    )
    assert cut == pytest.approx(plain, rel=1e-12)


def test_the_draw_comes_from_the_seed() -> None:
    features, batch = scene()
    term = term_of(read="vision")
    values = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        values.append(term(features, batch, NO_MODEL).value.item())
    assert values[0] == values[1] != values[2]


def test_absent_windows_do_not_count_even_if_they_are_nan() -> None:
    features, batch = scene()
    vision = features.vision.values.clone()
    vision[4:] = float("nan")
    vision.requires_grad_()
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[4:] = False
    term = term_of(read="vision", drop_one_view=False)
    z = F.normalize(term.head(features.vision.values[:4].mean(1)), dim=1)
    loss, _ = by_hand(z, batch.observation.state[:4], [0] * 4, 0.5, 0.2)
    result = term(replace(features, vision=Tokens(values=vision, mask=mask)), batch, NO_MODEL)
    assert result.value.item() == pytest.approx(loss, rel=1e-12)
    result.value.backward()
    assert vision.grad is not None and vision.grad.isfinite().all() and not vision.grad[4:].any()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in term.parameters())


@pytest.mark.parametrize("robots", [[0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2]])
def test_with_fewer_than_two_others_there_is_no_loss_and_no_gradient(robots: list[int]) -> None:
    features, batch = scene()
    readout = features.readout.clone().requires_grad_()
    term = term_of()
    result = term(
        replace(features, readout=readout), replace(batch, embodiment=torch.tensor(robots)), NO_MODEL
    )
    result.value.backward()
    assert result.value == 0 and result.metrics["state_contrastive/skipped"] == 1
    assert readout.grad is not None and not readout.grad.any()
    assert all(p.grad is None or not p.grad.any() for p in term.parameters())


def test_equal_states_give_a_finite_loss() -> None:
    features, batch = scene()
    still = replace(batch, observation=replace(batch.observation, state=torch.zeros(6, 3).double()))
    result = term_of()(features, still, NO_MODEL)
    assert result.value.isfinite()
    assert result.metrics["state_contrastive/floor"].item() == pytest.approx(log(5), rel=1e-12)
