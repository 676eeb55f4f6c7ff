"""The loss x part mask (which term may train which part of the model), and the plain sum under it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import reduce
from operator import add
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch.nn.parameter import Parameter

from tutti.frozen_config import FrozenConfig
from tutti.training.backward.interface import Backward
from tutti.training.backward.term_gradients import Gradients, separate_gradients
from tutti.training.optim.learning_rates import part_of
from tutti.types import LossTerms, UserError

OBJECTIVE = "objective"
"""The part of all terms' own heads, which no mask can forbid."""


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
    With `model.vlm` take `objective.action.stop_gradient: [fused]` instead: the decoder alone then learns
    from the action, in one backward pass.
    """

    kind: Literal["knowledge_insulation"] = "knowledge_insulation"
    may_train: ClassVar[dict[str, tuple[str, ...]]] = {"action": ("fusion", "action")}

    def build(self, parameters: Mapping[str, Parameter], terms: Collection[str] = ()) -> MaskedBackward:
        """The backward of a run that moves these parameters. Raises UserError if a part is missing."""
        return MaskedBackward(self.may_train, parameters, terms)


class BackwardUnderMask(Backward):
    """A backward under a mask: `may_train[term]` are the parts that a term may train; a term not named there
    trains every part.

    The heads of the terms (objective.*) always learn, each from its own term. `parameters` are the trainable
    parameters of a run, by name; a number is a place in their order. A shared parameter counts in its first
    place only.

    Raises: UserError if `may_train` names a term or part that does not exist.
    """

    def __init__(
        self,
        may_train: Mapping[str, Collection[str]],
        parameters: Mapping[str, Parameter],
        terms: Collection[str] = (),
    ) -> None:
        self.parameters = list(parameters.values())
        self.parts = [part_of(name) for name in parameters]
        # Of two names for one parameter the first stays: later entries of a dict replace earlier ones.
        places = {id(parameter): place for place, parameter in reversed(list(enumerate(self.parameters)))}
        self._first = frozenset(places.values())
        self.may_train = {term: frozenset(parts) for term, parts in may_train.items()}
        known = [part for part in dict.fromkeys(self.parts) if part != OBJECTIVE]
        _check("term", self.may_train, terms)
        _check("part", [part for parts in self.may_train.values() for part in sorted(parts)], known)

    def numbers(self, term: str) -> list[int]:
        """Numbers of the parameters that the term may train and that learn at present."""
        allowed = self.may_train.get(term)
        return [
            number
            for number, (part, parameter) in enumerate(zip(self.parts, self.parameters, strict=True))
            if number in self._first
            and parameter.requires_grad
            and (allowed is None or part == OBJECTIVE or part in allowed)
        ]

    def masked(self, gradients: Gradients) -> Gradients:
        allowed = {term: set(self.numbers(term)) for term in gradients}
        return {
            term: [g if number in allowed[term] else None for number, g in enumerate(of_term)]
            for term, of_term in gradients.items()
        }


class MaskedBackward(BackwardUnderMask):
    """grad_p = sum over the terms i that may train p of d (lambda_i L_i) / d p.

    Terms with the same mask share one pass, over just the parameters that they may train: the pass stops
    where they end, so that knowledge insulation costs less than two full passes. A parameter that no term
    may train keeps no gradient and does not change.
    """

    is_sum: ClassVar[bool] = True

    def add(self, terms: LossTerms, accumulation: int) -> None:
        groups: dict[frozenset[str] | None, list[str]] = {}
        for term in terms.values:
            groups.setdefault(self.may_train.get(term), []).append(term)
        # A group goes by the name of its first term, whose mask is that of all.
        losses = {
            group[0]: reduce(add, (terms.lambdas[name] * terms.values[name] for name in group)) / accumulation
            for group in groups.values()
        }
        for _, found in separate_gradients(losses, self.parameters, self.numbers, keep_graph=False):
            for parameter, gradient in zip(self.parameters, found, strict=True):
                if gradient is None:
                    continue
                if parameter.grad is None:
                    # A copy in the parameter's own layout: what autograd gives may be a view of itself.
                    parameter.grad = torch.empty_like(parameter).copy_(gradient)
                else:
                    parameter.grad += gradient


def _check(what: str, named: Iterable[str], known: Collection[str]) -> None:
    unknown = [name for name in dict.fromkeys(named) if name not in known]
    if unknown:
        raise UserError(
            f"backward.may_train names the {what} {', '.join(unknown)}; there {'are' if known else 'is'} "
            f"{', '.join(known) or 'none'}."
        )
