from .gradient_share import GradientShareBalancing, GradientShareBalancingConfig
from .interface import Balancing, FixedBalancing, FixedBalancingConfig
from .learned import (
    FamoBalancing,
    FamoBalancingConfig,
    UncertaintyBalancing,
    UncertaintyBalancingConfig,
)
from .softmax import (
    DwaBalancing,
    DwaBalancingConfig,
    RandomWeightsBalancing,
    RandomWeightsBalancingConfig,
)

__all__ = [
    "Balancing",
    "DwaBalancing",
    "DwaBalancingConfig",
    "FamoBalancing",
    "FamoBalancingConfig",
    "FixedBalancing",
    "FixedBalancingConfig",
    "GradientShareBalancing",
    "GradientShareBalancingConfig",
    "RandomWeightsBalancing",
    "RandomWeightsBalancingConfig",
    "UncertaintyBalancing",
    "UncertaintyBalancingConfig",
]
