"""A term of the user's own, named in the config as `kind: "package.module:Class"`."""

from __future__ import annotations

from tutti.objectives.term import Boundary, Model, Term
from tutti.objectives.weight_schedule import Weight
from tutti.plugin import CustomConfig


class CustomTermConfig(CustomConfig):
    """`kind: "package.module:Class"`. It is called as `Class(model, **options, name=..., stop_gradient=...)`.

    The class must be a `tutti.objectives.term.Term`; the last two arguments are for its `super().__init__`.
    """

    weight: Weight = 1.0
    stop_gradient: tuple[Boundary, ...] = ()

    def build(self, model: Model, name: str) -> Term:
        """The term called `name`. Raises UserError, naming the class, if it cannot be had or is no Term."""
        return self.make(Term, f"objective.{name}.kind", model, name=name, stop_gradient=self.stop_gradient)
