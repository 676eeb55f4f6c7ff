"""The plain sum of the terms under a loss x part mask: which term may train which part of the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.parameter import Parameter

from tutti.frozen_config import FrozenConfig
from tutti.training.backward.gradient_mask import GradientMask
from tutti.training.backward.interface import Backward
from tutti.training.backward.term_gradients import Gradients
from tutti.types import LossTerms


class MaskedBackwardConfig(FrozenConfig):
    """`kind: masked`: `may_train: {recon: [vision, fusion]}` lets recon train these and its head."""

    kind: Literal["masked"] = "masked"
    may_train: dict[str, tuple[str, ...]] = Field(
        min_length=1, description="Parts that a term may train; a term that is not named trains every part."
    )

    def build(self, parameters: Mapping[str, Parameter], terms: Collection[str] = ()) -> MaskedBackward:
        """The backward of a run that moves these parameters. Raises UserError for an unknown name."""
        return MaskedBackward(self.may_train, parameters, terms)


class KnowledgeInsulationConfig(FrozenConfig):
    """`kind: knowledge_insulation`: action trains fusion and decoder, the encoders learn from the rest.

    `stop_gradient: [vision, language]` on the action term would not do it: it reads what the fusion has made
    of the encoders' tokens, and the gradient goes back through the fusion.

    Source: 2505.23705, which insulates a pre-trained backbone from a new action expert. Differs: there the
    expert alone is moved; here the fusion, which has no pre-training of its own, learns from the action too.
    """

    kind: Literal["knowledge_insulation"] = "knowledge_insulation"

    @property
    def may_train(self) -> dict[str, tuple[str, ...]]:
        """The mask."""
        return {"action": ("fusion", "action")}

    def build(self, parameters: Mapping[str, Parameter], terms: Collection[str] = ()) -> MaskedBackward:
        """The backward of a run that moves these parameters. Raises UserError if a part is missing."""
        return MaskedBackward(self.may_train, parameters, terms)


class MaskedBackward(Backward):
    """grad_p = sum over the terms i that may train p of d (lambda_i L_i) / d p.

    Terms with the same mask share one pass, over just the parameters that they may train: the pass stops
    where they end, so that knowledge insulation costs less than two full passes. A parameter that no term
    may train keeps no gradient and does not change.
    """

    is_sum: ClassVar[bool] = True

    def __init__(
        self,
        may_train: Mapping[str, Collection[str]],
        parameters: Mapping[str, Parameter],
        terms: Collection[str] = (),
    ) -> None:
        self.mask = GradientMask(may_train, parameters, terms)

    def masked(self, gradients: Gradients) -> Gradients:
        return self.mask.apply(gradients)

    def add(self, terms: LossTerms, accumulation: int) -> None:
        passes: list[tuple[Tensor, list[int]]] = []
        for group in self.mask.groups(terms.values):
            total = sum(terms.lambdas[name] * terms.values[name] for name in group)
            numbers = self.mask.numbers(group[0])
            if isinstance(total, Tensor) and total.requires_grad and numbers:
                passes.append((total / accumulation, numbers))
        for place, (total, numbers) in enumerate(passes):
            parameters = [self.mask.parameters[number] for number in numbers]
            last = place == len(passes) - 1  # the last pass frees the graph
            gradients = torch.autograd.grad(total, parameters, retain_graph=not last, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is None:
                    continue
                if parameter.grad is None:
                    # A copy in the parameter's own layout: what autograd gives may be a view of itself.
                    parameter.grad = torch.empty_like(parameter).copy_(gradient)
                else:
                    parameter.grad += gradient
