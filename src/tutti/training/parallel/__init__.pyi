from .config import ParallelConfig
from .ddp import Computation, Ddp, Parallel, SingleProcess
from .fsdp import Fsdp

__all__ = [
    "Computation",
    "Ddp",
    "Fsdp",
    "Parallel",
    "ParallelConfig",
    "SingleProcess",
]
