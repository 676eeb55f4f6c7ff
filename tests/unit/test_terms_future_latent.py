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


def contrasted(latents: Tensor, there: Tensor) -> Tensor:
    """Of each picture the unit deviations from the mean over its tokens; where there is none, zeros."""
    views = [view - view.mean(dim=1, keepdim=True) for view in latents.split(CELLS, dim=1)]
    return torch.where(there[..., None], F.normalize(torch.cat(views, dim=1), dim=-1), 0)


def parts_of(term: FutureLatentTerm, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """z_t, z_{t+k} and the weight of each token. Of six windows the last has no second view, and the last but
    one's future lies past the end; noise differs from noise in every cell."""
    seen = torch.tensor([[i != 5 or n < CELLS for n in range(2 * CELLS)] for i in range(6)])
    later = seen & (torch.arange(6) != 4)[:, None]
    now, then = (
        contrasted(unit_latents(term.target, one.images), mask)
        for one, mask in ((batch.observation, seen), (batch.futures[K].observation, later))
    )
    return now, then, 1.01 * later.double()


def disturb(model: VLA, seed: int = 0) -> None:
    """Stands for an optimizer step."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.vision.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def test_value_is_one_minus_the_cosine_over_the_tokens_that_count() -> None:
    model, term, features, batch = scene()
    now, then, weight = parts_of(term, batch)
    predicted = F.normalize(now + term.predictor(features.fused_vision.values), dim=-1)
    expected = (weight * (1 - (predicted * then).sum(-1))).sum() / weight.sum()
    assert term(features, batch, model).value.item() == pytest.approx(expected.item(), rel=1e-12)


def test_what_does_not_change_hardly_counts() -> None:
    model, term, features, batch = scene()
    images = batch.observation.images.clone()
    images[:, 1, :, 16:, :16] = 255 - images[:, 1, :, 16:, :16]  # the third cell of view 1, nothing else
    future = batch.futures[K]
    changed = replace(future, observation=replace(future.observation, images=images))
    batch = replace(batch, futures={K: changed})
    now, then, weight = parts_of(term, batch)
    weight = torch.where(torch.arange(8) == 6, weight, weight * 0.01 / 1.01)
    predicted = F.normalize(now + term.predictor(features.fused_vision.values), dim=-1)
    expected = (weight * (1 - (predicted * then).sum(-1))).sum() / weight.sum()
    assert term(features, batch, model).value.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_predictor_that_knows_the_future_attains_zero_and_its_opposite_two() -> None:
    model, term, features, batch = scene()
    now, then, _ = parts_of(term, batch)
    term.predictor = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    for factor, expected in ((3.0, 0.0), (-0.5, 2.0)):
        told = replace(features, fused_vision=replace(features.fused_vision, values=factor * then - now))
        assert term(told, batch, model).value.item() == pytest.approx(expected, abs=1e-12)


def test_it_starts_close_to_copying() -> None:
    model, term, features, batch = scene()
    found = term(features, batch, model)
    assert found.value.item() == pytest.approx(found.metrics["latent/copy_baseline"].item(), rel=0.1)


def test_several_offsets_share_the_predictor_and_are_told_apart() -> None:
    model, batch = make_model(), as_double(make_batch())
    term = FutureLatentConfig(hidden=8, decay=RHO, offsets=(2, K)).build(model, "latent").double()
    model.double()
    features = model(batch.observation)
    found = term(features, batch, model)
    assert term.offset is not None
    values = []
    for place, offset in enumerate(term.offsets):
        alone = FutureLatentConfig(hidden=8, offsets=(offset,)).build(model, "latent").double()
        alone.load_state_dict({k: v for k, v in term.state_dict().items() if k != "offset"})
        fused = features.fused_vision
        told = replace(features, fused_vision=replace(fused, values=fused.values + term.offset[place]))
        expected = alone(told, batch, model)
        values.append(expected.value.item())
        assert found.metrics[f"latent/value/{offset}"].item() == pytest.approx(values[-1], rel=1e-12)
        baseline = expected.metrics["latent/copy_baseline"].item()
        assert found.metrics[f"latent/copy_baseline/{offset}"].item() == pytest.approx(baseline, rel=1e-12)
    assert found.value.item() == pytest.approx(sum(values) / 2, rel=1e-12)  # as many rows at each


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
    now, then, weight = parts_of(term, batch)
    expected = (weight * (1 - (now * then).sum(-1))).sum() / weight.sum()
    found = term(features, batch, model).metrics["latent/copy_baseline"].item()
    assert found == pytest.approx(expected.item(), rel=1e-12)
    still = replace(batch, futures={K: Future(observation=batch.observation, mask=batch.futures[K].mask)})
    assert term(features, still, model).metrics["latent/copy_baseline"].item() == pytest.approx(0, abs=1e-12)


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
