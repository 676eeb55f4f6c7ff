"""The sigmoid alignment term: formula, start of the bias, chance, what does not count, gradient, reach."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from fixtures.term_batches import NO_MODEL, make_batch, make_model, plain_batch, plain_features, reached
from tutti.objectives.config import TermConfig
from tutti.objectives.term import TermValue
from tutti.objectives.terms.alignment import SigmoidConfig, SigmoidTerm
from tutti.types import Tokens

SIX = torch.tensor([0, 1, 0, 2, 0, 1])
SHARE = (9 + 4 + 1) / 36
"""Positive pairs among the 36 of SIX."""


def term_of(width: int = 6, identity: bool = False, **config: Any) -> SigmoidTerm:
    torch.manual_seed(0)
    term = SigmoidTerm(SigmoidConfig(width=width, **config), width, width, "align")
    if identity:
        with torch.no_grad():
            for head in (term.vision_head, term.language_head):
                head.weight.copy_(torch.eye(width))
                head.bias.zero_()
    return term.double()


def run(
    term: SigmoidTerm, vision: Tensor, language: Tensor, ids: Tensor = SIX, mask: Tensor | None = None
) -> TermValue:
    one = None if mask is None else mask[:, None]
    return term(plain_features(vision[:, None], language[:, None], mask=one), plain_batch(ids), NO_MODEL)


def random_pair(b: int = 6, width: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(b, width, dtype=torch.float64), torch.randn(b, width, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def test_two_windows_by_hand() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    result = run(term_of(2, identity=True, temperature=1.0, bias=0.0), eye, eye, torch.arange(2))
    # s is 1 on the diagonal and 0 beside it: (1/2) (2 log(1 + e^-1) + 2 log 2)
    assert result.value.item() == pytest.approx(log(1 + exp(-1)) + log(2), rel=1e-12)


def test_equals_the_formula_with_shared_instructions() -> None:
    vision, language = random_pair()
    term = term_of(bias=-2.5)
    result = run(term, vision, language)
    z = F.normalize(term.vision_head(vision), dim=1)
    w = F.normalize(term.language_head(language), dim=1)
    scores = term.log_scale.exp() * z @ w.T - 2.5
    total = 0.0
    for i in range(6):
        for j in range(6):
            sign = 1 if SIX[i] == SIX[j] else -1
            total -= log(sigmoid(sign * scores[i, j].item())) / 6
    assert result.value.item() == pytest.approx(total, rel=1e-12)
    assert result.metrics["align/temperature"].item() == pytest.approx(0.1, rel=1e-6)  # held in float32
    assert result.metrics["align/bias"].item() == -2.5


def test_the_order_of_the_batch_does_not_matter() -> None:
    vision, language = random_pair()
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    term = term_of(bias=-1.0)
    first, second = run(term, vision, language), run(term, vision[order], language[order], SIX[order])
    torch.testing.assert_close(first.value, second.value, rtol=1e-12, atol=0)
    torch.testing.assert_close(first.metrics, second.metrics, rtol=1e-12, atol=0)


def test_the_bias_starts_at_the_share_of_positives_once_and_for_all() -> None:
    term = term_of()
    for ids in (SIX, torch.arange(6)):
        metrics = run(term, *random_pair(), ids=ids).metrics
        assert metrics["align/bias"].item() == pytest.approx(log(SHARE / (1 - SHARE)), rel=1e-12)
    with torch.no_grad():
        term.bias.add_(0.5)
    metrics = run(term, *random_pair()).metrics
    assert metrics["align/bias"].item() == pytest.approx(log(SHARE / (1 - SHARE)) + 0.5, rel=1e-12)


def test_a_given_bias_is_not_replaced() -> None:
    config = TypeAdapter(TermConfig).validate_python({"kind": "sigmoid", "bias": -10})
    assert isinstance(config, SigmoidConfig)
    term = config.build(make_model(), "align")
    batch = make_batch()
    assert term(make_model()(batch.observation), batch, NO_MODEL).metrics["align/bias"].item() == -10.0


def test_an_evaluated_batch_and_one_that_is_skipped_do_not_set_the_bias() -> None:
    term = term_of()
    vision, language = random_pair()
    value = run(term.eval(), vision, language).value
    assert not term.start_known and term.bias_start.item() == 0
    run(term.train(), vision, language, torch.zeros(6, dtype=torch.int64))
    assert not term.start_known and term.bias_start.item() == 0
    assert run(term, vision, language).value.item() == value.item()  # it had used the batch's own share
    assert term.start_known


def test_the_bias_survives_a_checkpoint() -> None:
    term, resumed = term_of(), term_of()
    run(term, *random_pair())
    resumed.load_state_dict(term.state_dict())
    other = torch.tensor([0, 0, 0, 0, 0, 1])
    vision, language = random_pair()
    assert run(resumed, vision, language, other).value == run(term, vision, language, other).value
    assert run(term_of(), vision, language, other).value != run(term, vision, language, other).value


def test_a_model_that_knows_nothing_is_at_chance() -> None:
    vision = torch.zeros(6, 6, dtype=torch.float64)
    language = vision.clone()
    vision[:, 0], language[:, 1] = 1, 1  # orthogonal: every similarity is 0
    result = run(term_of(identity=True), vision, language)
    entropy = -SHARE * log(SHARE) - (1 - SHARE) * log(1 - SHARE)
    assert result.value.item() == pytest.approx(6 * entropy, rel=1e-12)
    assert result.metrics["align/chance"].item() == pytest.approx(6 * entropy, rel=1e-12)


def test_perfect_embeddings_attain_zero() -> None:
    perfect = F.one_hot(SIX, 6).double()
    result = run(term_of(identity=True, temperature=0.01, bias=-50.0), perfect, perfect)
    assert result.value.item() < 1e-12
    assert result.metrics["align/accuracy"] == 1
    worst = run(term_of(identity=True, temperature=0.01, bias=-50.0), perfect, perfect[[1, 0, 3, 2, 1, 0]])
    assert worst.metrics["align/accuracy"] == 0


def test_absent_windows_do_not_count_even_if_they_are_nan() -> None:
    vision, language = random_pair()
    present = torch.tensor([True, True, True, True, False, False])
    term = term_of(bias=-1.0)
    few = run(term, vision[:4], language[:4], SIX[:4])
    vision[4:] = float("nan")
    vision.requires_grad_()
    masked = run(term, vision, language, SIX, present)
    assert masked.value.item() == pytest.approx(few.value.item(), rel=1e-12)
    torch.testing.assert_close(masked.metrics, few.metrics, rtol=1e-12, atol=0)
    masked.value.backward()
    assert vision.grad is not None and vision.grad.isfinite().all() and not vision.grad[4:].any()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in term.parameters())


def test_a_window_without_text_does_not_count() -> None:
    vision, language = random_pair()
    features = plain_features(vision[:, None], language[:, None])
    mask = torch.tensor([[True]] * 4 + [[False]] * 2)
    features = replace(features, language=Tokens(values=language[:, None] * 9, mask=mask))
    term = term_of(bias=-1.0)
    expected = run(term, vision[:4], language[:4] * 9, SIX[:4])
    assert term(features, plain_batch(SIX), NO_MODEL).value.item() == pytest.approx(
        expected.value.item(), rel=1e-12
    )


@pytest.mark.parametrize("present", [[True] * 6, [True] + [False] * 5, [False] * 6])
def test_below_two_instructions_there_is_no_loss_and_no_gradient(present: list[bool]) -> None:
    vision, language = random_pair()
    vision.requires_grad_()
    ids = torch.zeros(6, dtype=torch.int64) if all(present) else SIX
    term = term_of()
    result = run(term, vision, language, ids, torch.tensor(present))
    result.value.backward()
    assert result.value == 0 and result.metrics["align/skipped"] == 1 and result.metrics["align/chance"] == 0
    assert vision.grad is not None and not vision.grad.any()
    assert all(p.grad is None or not p.grad.any() for p in term.parameters())


def test_the_scale_never_exceeds_a_hundred() -> None:
    term = term_of(bias=0.0)
    with torch.no_grad():
        term.log_scale.fill_(9.0)
    assert run(term, *random_pair()).metrics["align/temperature"].item() == pytest.approx(0.01)


def test_scale_and_bias_do_not_decay() -> None:
    parameters = dict(term_of().named_parameters())
    assert parameters["log_scale"].ndim == parameters["bias"].ndim == 0  # it is for matrices alone


def test_gradients_are_right() -> None:
    term = term_of(temperature=1.0, bias=-0.5)
    names = ["log_scale", "bias", "vision_head.weight"]
    parameters = dict(term.named_parameters())

    def value(vision: Tensor, language: Tensor, *given: Tensor) -> Tensor:
        features = plain_features(vision[:, None], language[:, None])
        own = dict(zip(names, given, strict=True))
        return torch.func.functional_call(term.eval(), own, (features, plain_batch(SIX), NO_MODEL)).value

    inputs = [*random_pair(), *(parameters[name] for name in names)]
    assert torch.autograd.gradcheck(value, tuple(x.detach().clone().requires_grad_() for x in inputs))


def test_it_moves_both_encoders_and_its_heads() -> None:
    model = make_model()
    term = SigmoidConfig(width=8).build(model, "align")
    assert reached(model, term, make_batch()) == {"vision", "language", "head"}
    stopped = SigmoidConfig(width=8, stop_gradient=("vision",)).build(model, "align")
    assert reached(model, stopped, make_batch()) == {"language", "head"}


def test_nonsense_is_refused_with_its_key() -> None:
    for wrong in ({"bias": float("nan")}, {"bias": "half"}, {"temperature": 0.001}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            SigmoidConfig.model_validate(wrong)
