from .averages import Ema, ScheduleFreeAdamW
from .clipping import Clipper, RunningMoments, ZClipConfig
from .muon import Muon
from .optimizers import OptimizerConfig, OptimizerSet
from .schedules import BatchRampConfig, ScheduleConfig
from .update_parts import MomentumParts

__all__ = [
    "BatchRampConfig",
    "Clipper",
    "Ema",
    "MomentumParts",
    "Muon",
    "OptimizerConfig",
    "OptimizerSet",
    "RunningMoments",
    "ScheduleConfig",
    "ScheduleFreeAdamW",
    "ZClipConfig",
]
