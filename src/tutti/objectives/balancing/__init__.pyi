from .dwa import DwaBalancing, DwaBalancingConfig
from .famo import FamoBalancing, FamoBalancingConfig
from .gradient_share import GradientShareBalancing, GradientShareBalancingConfig
from .interface import Balancing, FixedBalancing, FixedBalancingConfig
from .kinds import BalancingConfig, CustomBalancingConfig
from .random_weights import RandomWeightsBalancing, RandomWeightsBalancingConfig
from .uncertainty import UncertaintyBalancing, UncertaintyBalancingConfig

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
