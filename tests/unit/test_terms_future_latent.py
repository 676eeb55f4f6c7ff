"""The future-latent term: its value, the slow target, its masks, the signs of collapse."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fixtures.term_batches import as_double, make_batch, make_loss, make_model
from tutti.models.vla import VLA
from tutti.objectives.terms.future_latent import FutureLatentConfig, FutureLatentTerm
from tutti.training.optim.optimizers import AdamWConfig, MuonConfig
from tutti.types import Batch, Features, Future

K = 4
CELLS = 4  # tokens of each view of the small model
RHO = 0.9


def build() -> tuple[VLA, FutureLatentTerm]:
    model = make_model()
    term = FutureLatentConfig(hidden=8, decay=RHO, offsets=(K,)).build(model, "latent")
    return model.double(), term.double()


def scene() -> tuple[VLA, FutureLatentTerm, Features, Batch]:
    model, term = build()
    batch = as_double(make_batch())
    return model, term, model(batch.observation), batch


def unit_latents(encoder: Any, images: Tensor) -> Tensor:
    """Of every view, whether it is there or not."""
    prepared = images.double() / 127.5 - 1
    with torch.no_grad():
        return F.normalize(encoder(prepared, torch.ones(images.shape[:2], dtype=torch.bool)).values, dim=-1)


def disturb(model: VLA, seed: int = 0) -> None:
    """Stands for an optimizer step."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.vision.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def test_value_is_one_minus_the_cosine_over_the_tokens_that_count() -> None:
    model, term, features, batch = scene()
    target = unit_latents(term.target, batch.futures[K].observation.images)
    predicted = F.normalize(term.predictor(features.fused_vision.values), dim=-1)
    losses = 1 - (predicted * target).sum(-1)
    # Of six windows the last has no second view, and the last but one's future lies past the end.
    kept = [losses[i, n] for i in range(6) for n in range(2 * CELLS) if i != 4 and (i != 5 or n < CELLS)]
    assert len(kept) == 4 * 8 + 4
    expected = torch.stack(kept).mean()
    assert term(features, batch, model).value.item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_predictor_that_knows_the_future_attains_zero_and_its_opposite_two() -> None:
    model, term, features, batch = scene()
    target = unit_latents(term.target, batch.futures[K].observation.images)
    term.predictor = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    for factor, expected in ((3.0, 0.0), (-0.5, 2.0)):
        told = replace(features, fused_vision=replace(features.fused_vision, values=factor * target))
        assert term(told, batch, model).value.item() == pytest.approx(expected, abs=1e-12)


def test_the_target_follows_exactly() -> None:
    model, term = build()
    expected = {name: value.numpy().copy() for name, value in model.vision.state_dict().items()}
    for step in range(5):
        disturb(model, step)
        term.update_targets(model)
        for name, value in model.vision.state_dict().items():
            expected[name] = RHO * expected[name] + (1 - RHO) * value.numpy()
    for name, value in term.target.state_dict().items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("decay", "moves"), [(1.0, False), (0.0, True)])
def test_a_decay_of_one_freezes_the_target_and_of_zero_copies_and_buffers_are_copied(
    decay: float, moves: bool
) -> None:
    model = make_model()
    model.vision.register_buffer("count", torch.tensor(0))
    term = FutureLatentConfig(decay=decay).build(model, "latent")
    start = copy.deepcopy(model.vision.state_dict())
    disturb(model)
    model.vision.get_buffer("count").fill_(7)
    term.update_targets(model)
    wanted = {**(model.vision.state_dict() if moves else start), "count": torch.tensor(7)}
    assert all(torch.equal(value, wanted[name]) for name, value in term.target.state_dict().items())


def test_no_gradient_and_no_optimizer_reaches_the_target() -> None:
    model = make_model()
    loss = make_loss(model, latent={"kind": "future_latent", "hidden": 8, "weight": 1.0})
    term = loss.terms["latent"]
    assert isinstance(term, FutureLatentTerm)
    batch = make_batch()
    loss(model(batch.observation), batch, model).total.backward()
    frozen = list(term.target.parameters())
    assert frozen and all(p.grad is None and not p.requires_grad for p in frozen)
    for config in (AdamWConfig(), MuonConfig()):
        owned = {id(parameter) for parameter in config.build(model, loss).parameters}
        assert not owned & {id(parameter) for parameter in frozen}
        assert all(id(p) in owned for p in model.parameters())


def test_the_target_stays_in_evaluation_mode() -> None:
    model = make_model()
    model.vision.train()
    term = FutureLatentConfig().build(model, "latent")
    for mode in (True, False, True):
        term.train(mode)
        assert term.training == mode
        assert not any(module.training for module in term.target.modules())
    assert all(module.training for module in model.vision.modules())


def test_a_view_that_is_absent_now_or_then_does_not_count() -> None:
    model, term, features, batch = scene()
    future = batch.futures[K]
    other = future.observation.image_mask.clone()
    other[0, 1] = False
    changed = replace(future, observation=replace(future.observation, image_mask=other))
    then = replace(batch, futures={K: changed})
    mask = features.fused_vision.mask.clone()
    mask[0, CELLS:] = False
    now = replace(features, fused_vision=replace(features.fused_vision, mask=mask))
    expected = term(now, batch, model).value.item()
    assert term(features, then, model).value.item() == pytest.approx(expected, rel=1e-12)
    assert term(features, then, model).value != term(features, batch, model).value


def test_the_copy_baseline_is_the_loss_of_a_scene_that_stands_still() -> None:
    model, term, features, batch = scene()
    disturb(model)
    term.update_targets(model)
    term.eval()
    now, then = (
        unit_latents(term.target, o.images) for o in (batch.observation, batch.futures[K].observation)
    )
    losses = 1 - (now * then).sum(-1)
    kept = torch.tensor([[i != 4 and (i != 5 or n < CELLS) for n in range(8)] for i in range(6)])
    found = term(features, batch, model).metrics["latent/copy_baseline"].item()
    assert found == pytest.approx(losses[kept].mean().item(), rel=1e-12)
    still = replace(batch, futures={K: Future(observation=batch.observation, mask=batch.futures[K].mask)})
    assert term(features, still, model).metrics["latent/copy_baseline"].item() == pytest.approx(0, abs=1e-12)
    assert "latent/copy_baseline" not in term.train()(features, batch, model).metrics


def test_spread_and_rank_of_the_targets() -> None:
    model, term, features, batch = scene()
    metrics = term.eval()(features, batch, model).metrics
    target = unit_latents(term.target, batch.futures[K].observation.images).numpy()
    kept = np.array([[i != 4 and (i != 5 or n < CELLS) for n in range(8)] for i in range(6)])
    rows = [target[i, n] - target[kept[:, n], n].mean(0) for i in range(6) for n in range(8) if kept[i, n]]
    singular = np.linalg.svd(np.stack(rows), compute_uv=False)
    share = singular / singular.sum()
    spread = np.sqrt(np.mean([row @ row for row in rows]))
    assert metrics["latent/target_std"].item() == pytest.approx(spread, rel=1e-9)
    rank = np.exp(-np.sum(share * np.log(share)))
    assert metrics["latent/target_rank"].item() == pytest.approx(rank, rel=1e-4)


def test_an_encoder_that_sees_nothing_shows_as_collapsed() -> None:
    model, term, features, batch = scene()
    with torch.no_grad():
        term.target.get_parameter("embed.weight").zero_()  # only its position embedding is left
    metrics = term.eval()(features, batch, model).metrics
    assert metrics["latent/target_std"] < 1e-7 and metrics["latent/copy_baseline"] < 1e-12
