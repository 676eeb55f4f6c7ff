"""The alignment term: multi-positive InfoNCE, its floor, its chance, what does not count, its gradient."""

from __future__ import annotations

from math import log

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fixtures.term_batches import NO_MODEL
from tutti.objectives.term import TermValue
from tutti.objectives.terms.alignment import ContrastiveConfig, ContrastiveTerm, contrast
from tutti.types import Batch, Features, Observation, Tokens


def features_of(vision: Tensor, language: Tensor, mask: Tensor | None = None) -> Features:
    b, width = vision.shape
    one = torch.ones(b, 1, dtype=torch.bool)
    tokens = Tokens(values=vision[:, None], mask=one if mask is None else mask[:, None])
    return Features(
        vision=tokens,
        language=Tokens(values=language[:, None], mask=one),
        readout=torch.zeros(b, width, dtype=vision.dtype),
        fused_vision=tokens,
    )


def batch_of(ids: Tensor) -> Batch:
    b = len(ids)
    seen = Observation(
        images=torch.zeros(b, 1, 3, 2, 2),
        image_mask=torch.ones(b, 1, dtype=torch.bool),
        text=torch.zeros(b, 1, dtype=torch.int64),
        text_mask=torch.ones(b, 1, dtype=torch.bool),
        state=torch.zeros(b, 1),
    )
    mask = torch.ones(b, 1, 1, dtype=torch.bool)
    zeros = torch.zeros(b, dtype=torch.int64)
    return Batch(
        observation=seen,
        actions=torch.zeros(b, 1, 1),
        action_mask=mask,
        instruction_id=ids,
        embodiment=zeros,
        window=zeros,
    )


def term_of(width: int = 6, temperature: float = 0.07, identity: bool = False) -> ContrastiveTerm:
    torch.manual_seed(0)
    config = ContrastiveConfig(width=width, temperature=temperature)
    term = ContrastiveTerm(config, width, width, "align")
    if identity:
        with torch.no_grad():
            for head in (term.vision_head, term.language_head):
                head.weight.copy_(torch.eye(width))
                head.bias.zero_()
    return term.double()


def run(
    term: ContrastiveTerm, vision: Tensor, language: Tensor, ids: Tensor, mask: Tensor | None = None
) -> TermValue:
    return term(features_of(vision, language, mask), batch_of(ids), NO_MODEL)


def random_pair(b: int, width: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(b, width, dtype=torch.float64), torch.randn(b, width, dtype=torch.float64)


def test_equals_plain_infonce_when_all_instructions_are_distinct() -> None:
    vision, language = random_pair(5)
    result = run(term_of(identity=True), vision, language, torch.arange(5))
    scores = F.normalize(vision, dim=1) @ F.normalize(language, dim=1).T / 0.07
    target = torch.arange(5)
    expected = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
    torch.testing.assert_close(result.value, expected, rtol=1e-6, atol=0)  # 0.07 is held in float32
    assert result.metrics["align/floor"] == 0
    assert result.metrics["align/chance"].item() == pytest.approx(log(5))


def test_equals_the_formula_with_shared_instructions() -> None:
    vision, language = random_pair(6)
    ids = torch.tensor([0, 1, 0, 2, 0, 1])
    term = term_of()
    result = run(term, vision, language, ids)
    z = F.normalize(term.vision_head(vision), dim=1)
    w = F.normalize(term.language_head(language), dim=1)
    total = 0.0
    for scores in ((z @ w.T) * term.log_scale.exp(), (w @ z.T) * term.log_scale.exp()):
        for i in range(6):
            positives = [j for j in range(6) if ids[j] == ids[i]]
            total -= sum(scores[i].log_softmax(0)[j].item() for j in positives) / len(positives) / 6 / 2
    assert result.value.item() == pytest.approx(total, rel=1e-12)
    assert result.metrics["align/floor"].item() == pytest.approx((3 * log(3) + 2 * log(2)) / 6)


def test_the_order_of_the_batch_does_not_matter() -> None:
    vision, language = random_pair(6)
    ids = torch.tensor([4, 1, 4, 2, 4, 1])
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    term = term_of()
    first, second = run(term, vision, language, ids), run(term, vision[order], language[order], ids[order])
    torch.testing.assert_close(first.value, second.value, rtol=1e-12, atol=0)
    torch.testing.assert_close(first.metrics, second.metrics, rtol=1e-12, atol=0)


def test_perfect_embeddings_attain_the_floor() -> None:
    ids = torch.tensor([0, 1, 0, 2, 0, 1])
    perfect = F.one_hot(ids, 6).double()
    result = run(term_of(temperature=0.01, identity=True), perfect, perfect, ids)
    assert abs(result.metrics["align/above_floor"].item()) < 1e-12
    assert result.metrics["align/accuracy"] == 1
    assert result.value.item() == pytest.approx(result.metrics["align/floor"].item())


def test_constant_embeddings_are_at_chance() -> None:
    same = torch.ones(6, 6, dtype=torch.float64)
    result = run(term_of(), same, same, torch.tensor([0, 1, 0, 2, 0, 1]))
    assert result.value.item() == pytest.approx(log(6))
    assert result.metrics["align/chance"].item() == pytest.approx(log(6))


def test_one_instruction_alone_gives_zero_without_gradient() -> None:
    vision, language = random_pair(4)
    vision.requires_grad_()
    term = term_of()
    result = run(term, vision, language, torch.full((4,), 7))
    result.value.backward()
    assert (
        result.value == 0
        and result.metrics["align/skipped"] == 1
        and result.metrics["align/above_floor"] == 0
    )
    assert vision.grad is not None and not vision.grad.any()
    assert all(p.grad is None or not p.grad.any() for p in term.parameters())
    assert run(term, vision, language, torch.arange(4)).metrics["align/skipped"] == 0


def test_windows_without_pictures_take_no_part() -> None:
    vision, language = random_pair(6)
    ids = torch.tensor([0, 1, 0, 2, 3, 1])
    there = torch.tensor([True, True, True, True, False, False])
    term = term_of()
    masked, cut = run(term, vision, language, ids, there), run(term, vision[:4], language[:4], ids[:4])
    torch.testing.assert_close(masked.value, cut.value, rtol=1e-12, atol=0)
    torch.testing.assert_close(masked.metrics, cut.metrics, rtol=1e-12, atol=0)
    nobody = run(term, vision, language, ids, torch.zeros(6, dtype=torch.bool))
    assert nobody.value == 0 and nobody.metrics["align/skipped"] == 1


def test_the_scale_is_clamped_and_can_come_back() -> None:
    term = term_of()
    with torch.no_grad():
        term.log_scale.fill_(9.0)
    vision, language = random_pair(5)
    result = run(term, vision, language, torch.arange(5))
    result.value.backward()
    assert term.log_scale.exp().item() <= 100 * (1 + 1e-6)
    assert result.metrics["align/temperature"].item() == pytest.approx(0.01)
    assert term.log_scale.grad is not None and term.log_scale.grad > 0  # descent lowers it again
    assert dict(term.named_parameters())["log_scale"].ndim == 0  # weight decay is for matrices alone


def test_gradients_are_right() -> None:
    vision, language = random_pair(5, width=3)
    ids = torch.tensor([0, 1, 0, 2, 1])
    term = term_of(width=3, temperature=0.5)
    scale = term.log_scale.detach().clone().requires_grad_()

    def value(v: Tensor, w: Tensor, g: Tensor) -> Tensor:
        scores = (
            g.exp() * F.normalize(term.vision_head(v), dim=1) @ F.normalize(term.language_head(w), dim=1).T
        )
        return contrast(scores, ids[:, None] == ids, torch.tensor([True] * 4 + [False]), g).value

    assert torch.autograd.gradcheck(value, (vision.requires_grad_(), language.requires_grad_(), scale))


def test_gradients_of_the_heads_are_right() -> None:
    vision, language = random_pair(5, width=3)
    term = term_of(width=3, temperature=0.5)
    names, weights = zip(*term.named_parameters(), strict=True)

    def value(*given: Tensor) -> Tensor:
        arguments = (features_of(vision, language), batch_of(torch.tensor([0, 1, 0, 2, 1])), NO_MODEL)
        return torch.func.functional_call(term, dict(zip(names, given, strict=True)), arguments).value

    copies = tuple(w.detach().clone().requires_grad_() for w in weights)
    assert torch.autograd.gradcheck(value, copies)
