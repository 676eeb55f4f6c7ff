"""A backward of the user's own, named in the config as `kind: "package.module:Class"`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch.nn.parameter import Parameter

from tutti.plugin import PATTERN, make
from tutti.training.backward import Backward


class CustomBackwardConfig(BaseModel):
    """`kind: "package.module:Class"`. It is called as `Class(parameters, terms, **options)`.

    The class must be a `tutti.training.backward.Backward`; `parameters` are the trainable ones by name
    (model... or objective...), `terms` the names of the objective's terms.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str = Field(pattern=PATTERN, description="package.module:Class")
    options: dict[str, Any] = {}

    @property
    def moves(self) -> dict[str, tuple[str, ...]]:
        """The mask, as far as it is known here: none."""
        return {}

    def build(self, parameters: Mapping[str, Parameter], terms: Collection[str] = ()) -> Backward:
        """The backward. Raises UserError, naming the class, if it cannot be had or is no Backward."""
        return make(self.kind, Backward, "backward.kind", parameters, tuple(terms), options=self.options)
