"""The future-latent term: its value, the slow target, whom it moves, its masks, the signs of collapse."""

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
from tutti.training.optim.averages import Ema
from tutti.training.optim.optimizers import AdamWConfig, MuonConfig
from tutti.types import Batch, Features, Future

K = 4
CELLS = 4  # tokens of each view of the small model
RHO = 0.9


def build(**config: Any) -> tuple[VLA, FutureLatentTerm]:
    model = make_model()
    term = FutureLatentConfig(hidden=8, decay=RHO, offset=K, **config).build(model, "latent")
    return model.double(), term.double()


def scene(model: VLA, batch: Batch | None = None) -> tuple[Features, Batch]:
    batch = as_double(make_batch()) if batch is None else batch
    return model(batch.observation), batch


def with_future(batch: Batch, **changes: Any) -> Batch:
    """The batch with another observation (or mask) at K."""
    return replace(batch, futures={K: replace(batch.futures[K], **changes)})


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
    model, term = build()
    features, batch = scene(model)
    target = unit_latents(term.target, batch.futures[K].observation.images)
    predicted = F.normalize(term.predictor(features.fused_vision.values), dim=-1)
    losses = 1 - (predicted * target).sum(-1)
    # Of six windows the last has no second view, and the last but one's future lies past the end.
    kept = [losses[i, n] for i in range(6) for n in range(2 * CELLS) if i != 4 and (i != 5 or n < CELLS)]
    assert len(kept) == 4 * 8 + 4
    expected = torch.stack(kept).mean()
    assert term(features, batch, model).value.item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_predictor_that_knows_the_future_attains_zero_and_its_opposite_two() -> None:
    model, term = build()
    features, batch = scene(model)
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
def test_a_decay_of_one_freezes_the_target_and_of_zero_copies(decay: float, moves: bool) -> None:
    model = make_model()
    term = FutureLatentConfig(decay=decay).build(model, "latent")
    start = copy.deepcopy(model.vision.state_dict())
    disturb(model)
    term.update_targets(model)
    wanted = model.vision.state_dict() if moves else start
    assert all(torch.equal(value, wanted[name]) for name, value in term.target.state_dict().items())


def test_buffers_are_copied() -> None:
    model = make_model()
    model.vision.register_buffer("count", torch.tensor(0))
    model.vision.register_buffer("mean", torch.zeros(2))
    term = FutureLatentConfig().build(model, "latent")
    model.vision.get_buffer("count").fill_(7)
    model.vision.get_buffer("mean").fill_(0.5)
    term.update_targets(model)
    assert term.target.get_buffer("count").item() == 7
    assert term.target.get_buffer("mean").tolist() == [0.5, 0.5]


def test_the_target_is_in_the_checkpoint_and_goes_on_from_there() -> None:
    model, term = build()
    for step in range(3):
        disturb(model, step)
        term.update_targets(model)
    other, resumed = build()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(term.state_dict())
    assert any(name.startswith("target.") for name in term.state_dict())
    for step in range(3, 5):
        for one, follower in ((model, term), (other, resumed)):
            disturb(one, step)
            follower.update_targets(one)
    for name, value in term.target.state_dict().items():
        assert torch.equal(value, resumed.target.state_dict()[name])
    features, batch = scene(model)
    assert resumed(features, batch, model).value.item() == term(features, batch, model).value.item()


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


def test_a_copy_follows_the_model_that_it_is_given() -> None:
    model, term = build()
    other, copied = copy.deepcopy((model, term))
    disturb(other)
    copied.update_targets(other)
    term.update_targets(model)
    start = make_model().double().vision.state_dict()
    assert any(not torch.equal(v, start[n]) for n, v in copied.target.state_dict().items())
    assert all(torch.allclose(v, start[n], atol=1e-15) for n, v in term.target.state_dict().items())
    assert not any(p.requires_grad for p in copied.target.parameters())


def test_averaging_the_objective_averages_the_target_and_gives_it_back() -> None:
    model, term = build()
    average = Ema(term, 0.5)
    disturb(model)
    term.update_targets(model)
    own = copy.deepcopy(term.state_dict())
    average.update()
    features, batch = scene(model)
    before = term(features, batch, model).value.item()
    with average.applied():
        assert term(features, batch, model).value.item() != before
    assert term(features, batch, model).value.item() == before
    assert all(torch.equal(value, own[name]) for name, value in term.state_dict().items())


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
    model, term = build()
    features, batch = scene(model)
    other = batch.futures[K].observation.image_mask.clone()
    other[0, 1] = False
    then = with_future(batch, observation=replace(batch.futures[K].observation, image_mask=other))
    mask = features.fused_vision.mask.clone()
    mask[0, CELLS:] = False
    now = replace(features, fused_vision=replace(features.fused_vision, mask=mask))
    expected = term(now, batch, model).value.item()
    assert term(features, then, model).value.item() == pytest.approx(expected, rel=1e-12)
    assert term(features, then, model).value != term(features, batch, model).value


def test_the_copy_baseline_is_the_loss_of_a_scene_that_stands_still() -> None:
    model, term = build()
    disturb(model)
    features, batch = scene(model)
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
    model, term = build()
    features, batch = scene(model)
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
    model, term = build()
    with torch.no_grad():
        term.target.get_parameter("embed.weight").zero_()  # only its position embedding is left
    features, batch = scene(model)
    metrics = term.eval()(features, batch, model).metrics
    assert metrics["latent/target_std"] < 1e-7 and metrics["latent/copy_baseline"] < 1e-12
