"""The recoverable-language term: its value, whom its gradients move, what it says of a scene, masks."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fixtures.term_batches import NO_MODEL, make_model, plain_batch, plain_features
from tutti.models.vla import VLA
from tutti.objectives.terms.recoverable_language import (
    RecoverableLanguageConfig,
    RecoverableLanguageTerm,
)
from tutti.types import Batch, Features, Tokens

IDS = torch.tensor([7, 3, 7, 5, 3, 7])
WIDTH = 16  # of the vision and language tokens of the small model
CHUNK = (5, 3)


def term_of(model: VLA | None = None, **config: Any) -> RecoverableLanguageTerm:
    model = model or make_model()
    return RecoverableLanguageConfig(width=6, **config).build(model, "words").double()


def scene(seed: int = 1) -> tuple[Features, Batch]:
    torch.manual_seed(seed)
    b = len(IDS)
    vision = torch.randn(b, 3, WIDTH, dtype=torch.float64)
    language = torch.randn(9, WIDTH, dtype=torch.float64)[IDS][:, None]
    readout = torch.randn(b, 32, dtype=torch.float64)
    actions = torch.randn(b, *CHUNK, dtype=torch.float64)
    return plain_features(vision, language, readout), plain_batch(IDS, actions=actions)


def cross_entropies(
    term: RecoverableLanguageTerm, features: Features, batch: Batch, rows: list[int]
) -> tuple[Tensor, Tensor]:
    """Of p(l | v, a) and of p(l | v), window by window, over the distinct instructions of `rows`."""
    known = list(dict.fromkeys(batch.instruction_id[rows].tolist()))
    first = [next(row for row in rows if batch.instruction_id[row] == one) for one in known]
    v, w = features.vision.mean(), features.language.mean()
    target = torch.tensor([known.index(one) for one in batch.instruction_id[rows].tolist()])
    joint = term.joint(torch.cat([v, batch.actions.flatten(1)], dim=1)) @ term.joint_language(w[first]).T
    alone = term.vision_only(v) @ term.vision_only_language(w[first]).T
    scale = term.config.width**0.5
    return F.cross_entropy(joint[rows] / scale, target), F.cross_entropy(alone[rows] / scale, target)


def test_two_windows_by_hand() -> None:
    term = term_of()
    features, batch = scene()
    with torch.no_grad():  # f(v, a) = (1, 0, ...), g(v) = 0; texts differ in their first number only
        for parameter in term.parameters():
            parameter.zero_()
        term.joint[2].bias[0] = 6**0.5
        term.joint_language.weight[0, 0] = 1.0
    words = torch.zeros(2, 1, WIDTH, dtype=torch.float64)
    words[0, 0, 0] = 1.0
    given = plain_features(features.vision.values[:2], words, features.readout[:2])
    result = term(given, plain_batch(IDS[:2], actions=batch.actions[:2]), NO_MODEL)
    # p(l | v, a) is (e, 1) / (e + 1) for both windows, p(l | v) is 1/2
    expected = (log(1 + exp(-1)) + log(1 + exp(1))) / 2 - log(2)
    assert result.value.item() == pytest.approx(expected, rel=1e-9)
    assert result.metrics["words/chance"].item() == pytest.approx(log(2), rel=1e-12)
    assert result.metrics["words/accuracy"].item() == 0.5


def test_the_value_is_what_the_action_adds() -> None:
    features, batch = scene()
    term = term_of()
    joint, alone = cross_entropies(term, features, batch, list(range(6)))
    result = term(features, batch, NO_MODEL)
    metrics = {name.removeprefix("words/"): metric.item() for name, metric in result.metrics.items()}
    assert result.value.item() == pytest.approx((joint - alone).item(), rel=1e-9)
    assert metrics["cross_entropy"] == pytest.approx(joint.item(), rel=1e-12)
    assert metrics["vision_only_cross_entropy"] == pytest.approx(alone.item(), rel=1e-12)
    assert metrics["floor"] == pytest.approx(-alone.item(), rel=1e-12)
    assert metrics["chance"] == pytest.approx(log(3), rel=1e-12)
    assert result.value.item() > metrics["floor"] and metrics["skipped"] == 0


def test_the_model_learns_from_the_joint_part_and_the_vision_head_from_its_own() -> None:
    features, batch = scene()
    vision = features.vision.values.clone().requires_grad_()
    language = features.language.values.clone().requires_grad_()
    features = plain_features(vision, language, features.readout)
    term = term_of()
    names, parameters = zip(*term.named_parameters(), strict=True)
    joint, alone = cross_entropies(term, features, batch, list(range(6)))
    found = torch.autograd.grad(term(features, batch, NO_MODEL).value, [vision, language, *parameters])
    wanted = list(torch.autograd.grad(joint, [vision, language], retain_graph=True))
    # In the term an instruction is read off its first window; by hand too, so the gradients lie in one place.
    for got, expected in zip(found[:2], wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-14)
    for name, parameter, got in zip(names, parameters, found[2:], strict=True):
        source = alone if name.startswith("vision_only") else joint
        (expected,) = torch.autograd.grad(source, parameter, retain_graph=True)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("betrayed", [False, True])
def test_it_tells_whether_the_picture_betrays_the_instruction(betrayed: bool) -> None:
    features, batch = scene()
    code = F.one_hot(torch.tensor([0, 1, 0, 2, 1, 0]), 15).double()
    vision = torch.zeros(6, 1, WIDTH, dtype=torch.float64)
    if betrayed:
        vision[:, 0, :15] = code
    features = plain_features(vision, features.language.values, features.readout)
    batch = replace(batch, actions=code.view(6, *CHUNK))
    term = term_of()
    optimizer = torch.optim.Adam(term.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        term(features, batch, NO_MODEL).value.backward()
        optimizer.step()
    result = term(features, batch, NO_MODEL)
    prior = -(3 * log(3 / 6) + 2 * log(2 / 6) + log(1 / 6)) / 6  # entropy of the batch's instructions
    assert result.value.item() == pytest.approx(0 if betrayed else -prior, abs=0.02)
    assert result.metrics["words/accuracy"] == 1
    assert result.metrics["words/vision_only_accuracy"].item() == (1 if betrayed else 0.5)


def test_the_readout_may_stand_for_the_action() -> None:
    features, batch = scene()
    term = term_of(action="readout")
    other = replace(batch, actions=batch.actions + 1)
    assert term(features, batch, NO_MODEL).value == term(features, other, NO_MODEL).value
    moved = replace(features, readout=features.readout + torch.randn(6, 32).double())
    assert term(moved, batch, NO_MODEL).value != term(features, batch, NO_MODEL).value


def test_absent_windows_and_padding_do_not_count_even_if_they_are_nan() -> None:
    features, batch = scene()
    vision, mask = features.vision.values.clone(), torch.ones(6, 3, dtype=torch.bool)
    vision[0], mask[0] = float("nan"), False  # the first window of its instruction has no picture
    vision[2, 1], mask[2, 1] = float("nan"), False
    language = torch.cat([features.language.values, torch.full((6, 1, WIDTH), float("nan")).double()], dim=1)
    words = torch.tensor([[True, False]] * 5 + [[False, False]])  # and the last one no text
    vision.requires_grad_()
    given = replace(
        features,
        vision=Tokens(values=vision, mask=mask),
        language=Tokens(values=language, mask=words),
    )
    term = term_of()
    joint, alone = cross_entropies(term, given, batch, [1, 2, 3, 4])
    result = term(given, batch, NO_MODEL)
    assert result.value.item() == pytest.approx((joint - alone).item(), rel=1e-9)
    result.value.backward()
    assert vision.grad is not None and vision.grad.isfinite().all() and not vision.grad[0].any()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in term.parameters())


@pytest.mark.parametrize("rows", [[0, 2, 5], []])
def test_below_two_instructions_there_is_no_loss_and_no_gradient(rows: list[int]) -> None:
    features, batch = scene()
    mask = torch.zeros(6, 3, dtype=torch.bool)
    mask[rows] = True
    vision = features.vision.values.clone().requires_grad_()
    term = term_of()
    result = term(replace(features, vision=Tokens(values=vision, mask=mask)), batch, NO_MODEL)
    result.value.backward()
    assert result.value == 0 and result.metrics["words/skipped"] == 1
    assert vision.grad is not None and not vision.grad.any()
    assert all(p.grad is None or not p.grad.any() for p in term.parameters())
