"""A backward of the user's own, named in the config as `kind: "package.module:Class"`."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch.nn.parameter import Parameter

from tutti.plugin import CustomConfig
from tutti.training.backward.one import Backward


class CustomBackwardConfig(CustomConfig):
    """`kind: "package.module:Class"`. It is called as `Class(parameters, terms, **options)`.

    The class must be a `tutti.training.backward.one.Backward`; `parameters` are the trainable ones by name
    (model... or objective...), `terms` the names of the objective's terms.
    """

    @property
    def moves(self) -> dict[str, tuple[str, ...]]:
        """The mask, as far as it is known here: none."""
        return {}

    def build(self, parameters: Mapping[str, Parameter], terms: Collection[str] = ()) -> Backward:
        """The backward. Raises UserError, naming the class, if it cannot be had or is no Backward."""
        return self.make(Backward, "backward.kind", parameters, tuple(terms))
