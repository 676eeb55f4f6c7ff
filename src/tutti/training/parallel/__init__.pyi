from .config import ParallelConfig
from .ddp import Computation, Parallel

__all__ = ["Computation", "Parallel", "ParallelConfig"]
