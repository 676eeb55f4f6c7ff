from .dwa import DwaBalancing, DwaBalancingConfig
from .famo import FamoBalancing, FamoBalancingConfig
from .fixed import Balancing, FixedBalancing, FixedBalancingConfig
from .gradient_share import GradientShareBalancing, GradientShareBalancingConfig
from .random_weights import RandomWeightsBalancing, RandomWeightsBalancingConfig
from .uncertainty import UncertaintyBalancing, UncertaintyBalancingConfig
from .union import BalancingConfig, CustomBalancingConfig

__all__ = [
    "Balancing",
    "BalancingConfig",
    "CustomBalancingConfig",
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
