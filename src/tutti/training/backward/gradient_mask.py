"""The loss x part mask of a backward pass: which term may train which part of the model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch.nn.parameter import Parameter

from tutti.training.backward.term_gradients import Gradients
from tutti.training.optim.optimizers import part_of
from tutti.types import UserError

OBJECTIVE = "objective"
"""The part of all terms' own heads, which no mask can forbid."""


class GradientMask:
    """`may_train[term]` are the parts that a term may train; a term not named there trains every part.

    The heads of the terms (objective.*) always learn, each from its own term. `parameters` are the trainable
    parameters of a run, by name; a number is a place in their order. A shared parameter counts in its first
    place only.

    Raises: UserError if `may_train` names a term or part that does not exist.
    """

    def __init__(
        self,
        may_train: Mapping[str, Collection[str]],
        parameters: Mapping[str, Parameter],
        terms: Collection[str],
    ) -> None:
        self.parameters = list(parameters.values())
        self.parts = [part_of(name) for name in parameters]
        places = {id(parameter): place for place, parameter in reversed(list(enumerate(self.parameters)))}
        self.first = frozenset(places.values())
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
            if number in self.first
            and parameter.requires_grad
            and (allowed is None or part == OBJECTIVE or part in allowed)
        ]

    def apply(self, gradients: Gradients) -> Gradients:
        """Replaces gradients by None where the term may not train the parameter."""
        allowed = {term: set(self.numbers(term)) for term in gradients}
        return {
            term: [g if number in allowed[term] else None for number, g in enumerate(of_term)]
            for term, of_term in gradients.items()
        }

    def groups(self, terms: Iterable[str]) -> list[list[str]]:
        """Groups the terms that have the same mask, in their order: one backward pass serves a group."""
        groups: dict[frozenset[str] | None, list[str]] = {}
        for term in terms:
            groups.setdefault(self.may_train.get(term), []).append(term)
        return list(groups.values())


def _check(what: str, named: Iterable[str], known: Collection[str]) -> None:
    unknown = [name for name in dict.fromkeys(named) if name not in known]
    if unknown:
        have: Sequence[str] = list(known)
        raise UserError(
            f"backward.may_train names the {what} {', '.join(unknown)}; there {'are' if have else 'is'} "
            f"{', '.join(have) or 'none'}."
        )
