"""Changed patches: the future picture's term with weights of its own, and the default left as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from fixtures.term_batches import make_batch, make_loss, make_model
from tutti.objectives.config import ObjectiveConfig
from tutti.objectives.terms.patches import ChangedPatchesConfig, FuturePatchesConfig
from tutti.types import UserError

SMALL = {"width": 16, "heads": 2, "offset": 3}


def test_it_is_future_patches_weighted_by_change_to_the_last_bit() -> None:
    batch = make_batch()
    found = []
    for recon in (
        {"kind": "changed_patches", "floor": 0.03, "threshold": 0.5, **SMALL},
        {"kind": "future_patches", "weighting": "changed", "floor": 0.03, "threshold": 0.5, **SMALL},
    ):
        model = make_model()
        loss = make_loss(model, recon=recon)
        terms = loss(model(batch.observation), batch, model)
        terms.total.backward()
        gradients = {n: p.grad for m in (model, loss) for n, p in m.named_parameters() if p.grad is not None}
        needs = ObjectiveConfig.model_validate({"state": None, "recon": recon}).needs()
        found.append((terms, gradients, needs.futures))
    (first, ours, needs), (second, theirs, wanted) = found
    assert torch.equal(first.total, second.total) and first.metrics == second.metrics
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert needs == wanted == (3,)


@pytest.mark.parametrize(
    ("kind", "floor"), [("changed_patches", 0.01), ("future_patches", 0.1)], ids=["own floor", "theirs"]
)
def test_its_own_floor_leaves_little_to_what_stands_still(kind: str, floor: float) -> None:
    """All is predicted as 0. One patch of four turns to stripes, l_p = 1; the rest stays grey, l_p = 0."""
    batch = make_batch()
    grey = torch.full_like(batch.observation.images, 128)
    striped = grey.clone()
    striped[..., :16, :16] = (torch.arange(16) // 2 % 2 * 255).to(torch.uint8)
    future = batch.futures[3]
    later = replace(future, observation=replace(future.observation, images=striped))
    batch = replace(batch, observation=replace(batch.observation, images=grey), futures={3: later})
    model = make_model()
    term = make_loss(model, recon={"kind": kind, **SMALL}).terms["recon"]
    with torch.no_grad():
        term.out.weight.zero_()
        term.out.bias.zero_()
    result = term(model(batch.observation), batch, model)
    assert result.metrics["recon/changed_share"].item() == pytest.approx(0.25)
    assert result.value.item() == pytest.approx((1 + floor) * 0.25 / (floor + 0.25), rel=1e-5)


def test_the_default_objective_is_what_it_was() -> None:
    recon = ObjectiveConfig().recon
    assert isinstance(recon, FuturePatchesConfig)
    assert (recon.weighting, recon.floor, recon.threshold) == ("changed", 0.1, 0.04)
    ours = ChangedPatchesConfig()
    assert (ours.floor, ours.threshold, ours.weight) == (0.01, 0.04, recon.weight)
    assert ObjectiveConfig.model_validate({"recon": {"kind": "changed_patches"}}).recon == ours


def test_clashes_are_refused_as_by_future_patches() -> None:
    with pytest.raises(ValidationError, match="not divisible by heads"):
        ChangedPatchesConfig(width=10, heads=4)
    with pytest.raises(ValidationError, match="weighting"):
        ChangedPatchesConfig.model_validate({"weighting": "uniform"})
    with pytest.raises(UserError, match=r"moving\.offset is 6, but must lie in 1\.\.5"):
        ChangedPatchesConfig(offset=6).build(make_model(), "moving")
