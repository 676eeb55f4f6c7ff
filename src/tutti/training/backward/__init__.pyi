from .one import Backward, OneBackwardConfig
from .union import BackwardConfig

__all__ = ["Backward", "BackwardConfig", "OneBackwardConfig"]
