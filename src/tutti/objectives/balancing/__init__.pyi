from .interface import Balancing
from .learned import (
    FamoBalancing,
    FamoBalancingConfig,
    UncertaintyBalancing,
    UncertaintyBalancingConfig,
)
from .shares import SharesBalancing, SharesBalancingConfig
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
    "RandomWeightsBalancing",
    "RandomWeightsBalancingConfig",
    "SharesBalancing",
    "SharesBalancingConfig",
    "UncertaintyBalancing",
    "UncertaintyBalancingConfig",
]
