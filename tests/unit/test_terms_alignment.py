"""The alignment terms: formulas, floor and chance, accuracy, the scale, and where the bias starts."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fixtures.term_batches import NO_MODEL, make_batch, make_loss, make_model, plain_batch, plain_features
from tutti.objectives.term import TermValue
from tutti.objectives.terms.alignment import (
    ContrastiveConfig,
    ContrastiveTerm,
    EmbeddingTerm,
    SigmoidConfig,
    SigmoidTerm,
)
from tutti.types import Tokens

SIX = torch.tensor([0, 1, 0, 2, 0, 1])
SHARE = (9 + 4 + 1) / 36
"""Positive pairs among the 36 of SIX."""


def contrastive(width: int = 6, identity: bool = False, **config: Any) -> ContrastiveTerm:
    torch.manual_seed(0)
    made = ContrastiveTerm(ContrastiveConfig(width=width, **config), width, width, "align")
    return with_identity(made) if identity else made.double()


def sigmoid(width: int = 6, identity: bool = False, **config: Any) -> SigmoidTerm:
    torch.manual_seed(0)
    made = SigmoidTerm(SigmoidConfig(width=width, **config), width, width, "align")
    return with_identity(made) if identity else made.double()


def with_identity(term: Any) -> Any:
    """The term with heads that change nothing."""
    with torch.no_grad():
        for head in (term.vision_head, term.language_head):
            head.weight.copy_(torch.eye(len(head.weight)))
            head.bias.zero_()
    return term.double()


def run(
    term: EmbeddingTerm, vision: Tensor, language: Tensor, ids: Tensor = SIX, mask: Tensor | None = None
) -> TermValue:
    one = None if mask is None else mask[:, None]
    return term(plain_features(vision[:, None], language[:, None], mask=one), plain_batch(ids), NO_MODEL)


def random_pair(b: int = 6, width: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(b, width, dtype=torch.float64), torch.randn(b, width, dtype=torch.float64)


def similarities(term: EmbeddingTerm, vision: Tensor, language: Tensor) -> Tensor:
    z = F.normalize(term.vision_head(vision), dim=1)
    return term.log_scale.exp() * z @ F.normalize(term.language_head(language), dim=1).T


def test_contrastive_equals_plain_infonce_when_all_instructions_are_distinct() -> None:
    vision, language = random_pair(5)
    result = run(contrastive(identity=True), vision, language, torch.arange(5))
    scores = F.normalize(vision, dim=1) @ F.normalize(language, dim=1).T / 0.07
    target = torch.arange(5)
    expected = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
    torch.testing.assert_close(result.value, expected, rtol=1e-6, atol=0)  # 0.07 is held in float32
    assert result.metrics["align/floor"] == 0
    assert result.metrics["align/chance"].item() == pytest.approx(log(5))


def test_contrastive_equals_the_formula_with_shared_instructions() -> None:
    vision, language = random_pair()
    term = contrastive()
    result, total = run(term, vision, language), 0.0
    for scores in (similarities(term, vision, language), similarities(term, vision, language).T):
        for i in range(6):
            positives = [j for j in range(6) if SIX[j] == SIX[i]]
            total -= sum(scores[i].log_softmax(0)[j].item() for j in positives) / len(positives) / 6 / 2
    assert result.value.item() == pytest.approx(total, rel=1e-12)
    assert result.metrics["align/floor"].item() == pytest.approx((3 * log(3) + 2 * log(2)) / 6)


def test_two_windows_of_sigmoid_by_hand() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    result = run(sigmoid(2, identity=True, temperature=1.0, bias=0.0), eye, eye, torch.arange(2))
    # s is 1 on the diagonal and 0 beside it: (1/2) (2 log(1 + e^-1) + 2 log 2)
    assert result.value.item() == pytest.approx(log(1 + exp(-1)) + log(2), rel=1e-12)


def test_sigmoid_equals_the_formula_with_shared_instructions() -> None:
    vision, language = random_pair()
    term = sigmoid(bias=-2.5)
    result = run(term, vision, language)
    scores, total = similarities(term, vision, language) - 2.5, 0.0
    for i in range(6):
        for j in range(6):
            sign = 1 if SIX[i] == SIX[j] else -1
            total += log(1 + exp(-sign * scores[i, j].item())) / 6
    assert result.value.item() == pytest.approx(total, rel=1e-12)
    assert result.metrics["align/temperature"].item() == pytest.approx(0.1, rel=1e-6)  # held in float32
    assert result.metrics["align/bias"].item() == -2.5


@pytest.mark.parametrize("make", [contrastive, sigmoid])
def test_the_order_of_the_batch_does_not_matter(make: Any) -> None:
    vision, language = random_pair()
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    term = make()
    first, second = run(term, vision, language), run(term, vision[order], language[order], SIX[order])
    torch.testing.assert_close(first.value, second.value, rtol=1e-12, atol=0)
    torch.testing.assert_close(first.metrics, second.metrics, rtol=1e-12, atol=0)


def test_perfect_embeddings_attain_the_floor_and_wrong_ones_match_nothing() -> None:
    perfect = F.one_hot(SIX, 6).double()
    result = run(contrastive(temperature=0.01, identity=True), perfect, perfect)
    assert abs(result.metrics["align/above_floor"].item()) < 1e-12
    assert result.metrics["align/accuracy"] == 1
    assert result.value.item() == pytest.approx(result.metrics["align/floor"].item())
    yes_or_no = sigmoid(identity=True, temperature=0.01, bias=-50.0)
    result = run(yes_or_no, perfect, perfect)
    assert result.value.item() < 1e-12 and result.metrics["align/accuracy"] == 1
    worst = run(yes_or_no, perfect, perfect[[1, 0, 3, 2, 1, 0]])
    assert worst.metrics["align/accuracy"] == 0


def test_a_model_that_knows_nothing_is_at_chance() -> None:
    same = torch.ones(6, 6, dtype=torch.float64)
    result = run(contrastive(), same, same)
    assert result.value.item() == pytest.approx(log(6))
    assert result.metrics["align/chance"].item() == pytest.approx(log(6))
    vision = torch.zeros(6, 6, dtype=torch.float64)
    language = vision.clone()
    vision[:, 0], language[:, 1] = 1, 1  # orthogonal: every similarity is 0
    result = run(sigmoid(identity=True), vision, language)
    entropy = -SHARE * log(SHARE) - (1 - SHARE) * log(1 - SHARE)
    assert result.value.item() == pytest.approx(6 * entropy, rel=1e-12)
    assert result.metrics["align/chance"].item() == pytest.approx(6 * entropy, rel=1e-12)


@pytest.mark.parametrize("make", [contrastive, sigmoid])
@pytest.mark.parametrize("present", [[True] * 6, [True] + [False] * 5])
def test_below_two_instructions_there_is_no_loss_and_no_gradient(make: Any, present: list[bool]) -> None:
    vision, language = random_pair()
    vision.requires_grad_()
    ids = torch.zeros(6, dtype=torch.int64) if all(present) else SIX
    term = make()
    result = run(term, vision, language, ids, torch.tensor(present))
    result.value.backward()
    assert result.value == 0 and result.metrics["align/skipped"] == 1
    assert result.metrics.get("align/above_floor", 0) == 0
    assert vision.grad is not None and not vision.grad.any()
    assert all(p.grad is None or not p.grad.any() for p in term.parameters())
    assert run(term, vision, language).metrics["align/skipped"] == 0


@pytest.mark.parametrize("make", [contrastive, sigmoid])
def test_windows_without_picture_or_text_take_no_part(make: Any) -> None:
    vision, language = random_pair()
    there = torch.tensor([True] * 4 + [False] * 2)
    term = make()
    few = run(term.eval(), vision[:4], language[:4], SIX[:4])
    wordless = plain_features(vision[:, None], language[:, None])
    wordless = replace(wordless, language=Tokens(values=language[:, None], mask=there[:, None]))
    for masked in (run(term, vision, language, SIX, there), term(wordless, plain_batch(SIX), NO_MODEL)):
        torch.testing.assert_close(masked.value, few.value, rtol=1e-12, atol=0)
        torch.testing.assert_close(masked.metrics, few.metrics, rtol=1e-12, atol=0)


def test_the_scale_is_clamped_and_can_come_back_and_does_not_decay() -> None:
    vision, language = random_pair()
    for term in (contrastive(), sigmoid(bias=0.0)):
        with torch.no_grad():
            term.log_scale.fill_(9.0)
        result = run(term, vision, language)
        result.value.backward()
        assert term.log_scale.exp().item() <= 100 * (1 + 1e-6)
        assert result.metrics["align/temperature"].item() == pytest.approx(0.01)
        assert term.log_scale.grad is not None and term.log_scale.grad > 0  # descent lowers it again
        scalars = [p.ndim for name, p in term.named_parameters() if "head" not in name]
        assert not any(scalars)  # weight decay is for matrices alone


def test_the_bias_starts_at_the_share_of_positives_once_and_for_all() -> None:
    term = sigmoid()
    start = log(SHARE / (1 - SHARE))
    for ids in (SIX, torch.arange(6)):
        assert run(term, *random_pair(), ids=ids).metrics["align/bias"].item() == pytest.approx(start)
    with torch.no_grad():
        term.bias.add_(0.5)
    assert run(term, *random_pair()).metrics["align/bias"].item() == pytest.approx(start + 0.5, rel=1e-12)


def test_a_given_bias_is_not_replaced() -> None:
    model, batch = make_model(), make_batch()
    loss = make_loss(model, align={"kind": "sigmoid", "bias": -10})
    assert loss(model(batch.observation), batch, model).metrics["align/bias"].item() == -10.0


def test_an_evaluated_batch_and_one_that_is_skipped_do_not_set_the_bias() -> None:
    term = sigmoid()
    vision, language = random_pair()
    value = run(term.eval(), vision, language).value
    run(term.train(), vision, language, torch.zeros(6, dtype=torch.int64))
    assert not term.start_known and term.bias_start.item() == 0
    assert run(term, vision, language).value.item() == value.item()  # it had used the batch's own share
    assert term.start_known


def test_the_bias_survives_a_checkpoint() -> None:
    term, resumed = sigmoid(), sigmoid()
    run(term, *random_pair())
    resumed.load_state_dict(term.state_dict())
    other = torch.tensor([0, 0, 0, 0, 0, 1])
    vision, language = random_pair()
    assert run(resumed, vision, language, other).value == run(term, vision, language, other).value
    assert run(sigmoid(), vision, language, other).value != run(term, vision, language, other).value
