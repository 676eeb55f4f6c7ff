from .batch_ramp import BatchRampConfig
from .clipping import Clipper, ZClipConfig
from .ema import Ema
from .muon import Muon
from .optimizers import OptimizerConfig, OptimizerSet
from .schedule_free import ScheduleFreeAdamW
from .schedules import ScheduleConfig

__all__ = [
    "BatchRampConfig",
    "Clipper",
    "Ema",
    "Muon",
    "OptimizerConfig",
    "OptimizerSet",
    "ScheduleConfig",
    "ScheduleFreeAdamW",
    "ZClipConfig",
]
