"""A balancing of the user's own, named in the config as `kind: "package.module:Class"`."""

from __future__ import annotations

from collections.abc import Mapping

from tutti.objectives.balancing.fixed import Balancing
from tutti.objectives.weight_schedule import WeightSchedule
from tutti.plugin import CustomConfig


class CustomBalancingConfig(CustomConfig):
    """`kind: "package.module:Class"`. It is called as `Class(schedules, **options)`.

    The class must be a `tutti.objectives.balancing.fixed.Balancing`; `schedules` are for its
    `super().__init__`.
    """

    def build(self, schedules: Mapping[str, WeightSchedule]) -> Balancing:
        """The balancing. Raises UserError, naming the class, if it cannot be had or is no Balancing."""
        return self.make(Balancing, "balancing.kind", schedules)
