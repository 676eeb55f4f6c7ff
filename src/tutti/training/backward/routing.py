"""Which term may move which part of the model: the loss x part mask of a backward."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch.nn.parameter import Parameter

from tutti.training.backward.term_gradients import Gradients
from tutti.training.optim.optimizers import part_of
from tutti.types import UserError

OBJECTIVE = "objective"
"""The part of all terms' own heads, which no mask can forbid."""


class Routing:
    """`moves[term]` are the parts that a term may move; a term not named there moves everything.

    The heads of the terms (objective.*) always learn, each from its own term. `parameters` are the trainable
    ones of a run, by name; the numbers are their places. One that is there twice is moved in its first place.

    Raises: UserError if `moves` names a term or part that does not exist.
    """

    def __init__(
        self,
        moves: Mapping[str, Collection[str]],
        parameters: Mapping[str, Parameter],
        terms: Collection[str],
    ) -> None:
        self.parameters = list(parameters.values())
        self.parts = [part_of(name) for name in parameters]
        places = {id(parameter): place for place, parameter in reversed(list(enumerate(self.parameters)))}
        self.first = frozenset(places.values())
        self.moves = {term: frozenset(parts) for term, parts in moves.items()}
        known = [part for part in dict.fromkeys(self.parts) if part != OBJECTIVE]
        _check("term", self.moves, terms)
        _check("part", [part for parts in self.moves.values() for part in sorted(parts)], known)

    def numbers(self, term: str) -> list[int]:
        """Numbers of the parameters that the term may move and that learn at present."""
        allowed = self.moves.get(term)
        return [
            number
            for number, (part, parameter) in enumerate(zip(self.parts, self.parameters, strict=True))
            if number in self.first
            and parameter.requires_grad
            and (allowed is None or part == OBJECTIVE or part in allowed)
        ]

    def apply(self, gradients: Gradients) -> Gradients:
        """The same gradients of all parameters, None where the term may not move the parameter."""
        found: Gradients = {}
        for term, own in gradients.items():
            allowed = set(self.numbers(term))
            found[term] = [g if number in allowed else None for number, g in enumerate(own)]
        return found

    def groups(self, terms: Iterable[str]) -> list[list[str]]:
        """The terms with the same mask together, in their order."""
        found: dict[frozenset[str] | None, list[str]] = {}
        for term in terms:
            found.setdefault(self.moves.get(term), []).append(term)
        return list(found.values())


def _check(what: str, named: Iterable[str], known: Collection[str]) -> None:
    unknown = [name for name in dict.fromkeys(named) if name not in known]
    if unknown:
        have: Sequence[str] = list(known)
        raise UserError(
            f"backward.moves names the {what} {', '.join(unknown)}; there {'are' if have else 'is'} "
            f"{', '.join(have) or 'none'}."
        )
