"""Union of the configs of all balancing methods: what `balancing` may be, told apart by `kind`.

A further method is one file beside this one and two lines here: its import and its place in the union.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Tag

from tutti.objectives.balancing.dwa import DwaBalancingConfig
from tutti.objectives.balancing.famo import FamoBalancingConfig
from tutti.objectives.balancing.gradient_share import GradientShareBalancingConfig
from tutti.objectives.balancing.interface import Balancing, FixedBalancingConfig
from tutti.objectives.balancing.random_weights import RandomWeightsBalancingConfig
from tutti.objectives.balancing.uncertainty import UncertaintyBalancingConfig
from tutti.plugin import CUSTOM, CustomConfig, tag_of


class CustomBalancingConfig(CustomConfig[Balancing]):
    """`kind: "package.module:Class"`, a `Balancing`: `Class(schedules, **options)`."""

    base, key = Balancing, "balancing.kind"


BalancingConfig = Annotated[
    Annotated[FixedBalancingConfig, Tag("fixed")]
    | Annotated[GradientShareBalancingConfig, Tag("gradient_share")]
    | Annotated[UncertaintyBalancingConfig, Tag("uncertainty")]
    | Annotated[DwaBalancingConfig, Tag("dwa")]
    | Annotated[RandomWeightsBalancingConfig, Tag("rlw")]
    | Annotated[FamoBalancingConfig, Tag("famo")]
    | Annotated[CustomBalancingConfig, Tag(CUSTOM)],
    Discriminator(tag_of),
]
