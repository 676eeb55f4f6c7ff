from .config import ParallelConfig
from .ddp import Ddp, LossModule, Parallel
from .fsdp import Fsdp

__all__ = [
    "Ddp",
    "Fsdp",
    "LossModule",
    "Parallel",
    "ParallelConfig",
]
