"""A balancing of the user's own, named in the config as `kind: "package.module:Class"`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tutti.objectives.balancing import Balancing
from tutti.objectives.schedule import WeightSchedule
from tutti.plugin import PATTERN, make


class CustomBalancingConfig(BaseModel):
    """`kind: "package.module:Class"`. It is called as `Class(schedules, **options)`.

    The class must be a `tutti.objectives.balancing.Balancing`; `schedules` are for its `super().__init__`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str = Field(pattern=PATTERN, description="package.module:Class")
    options: dict[str, Any] = {}

    def build(self, schedules: Mapping[str, WeightSchedule]) -> Balancing:
        """The balancing. Raises UserError, naming the class, if it cannot be had or is no Balancing."""
        return make(self.kind, Balancing, "balancing.kind", schedules, options=self.options)
