from .averages import Ema, ScheduleFreeAdamW
from .clipping import Clipper, RunningMoments, ZClipConfig
from .muon import Muon
from .optimizers import OptimizerConfig, OptimizerSet
from .schedules import BatchRampConfig, ScheduleConfig

__all__ = [
    "BatchRampConfig",
    "Clipper",
    "Ema",
    "Muon",
    "OptimizerConfig",
    "OptimizerSet",
    "RunningMoments",
    "ScheduleConfig",
    "ScheduleFreeAdamW",
    "ZClipConfig",
]
