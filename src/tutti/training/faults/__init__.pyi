from .non_finite import NonFiniteError, NonFiniteGuard
from .policy import FaultPolicy, roll_back
from .saved_steps import load_step, save_step

__all__ = ["FaultPolicy", "NonFiniteError", "NonFiniteGuard", "load_step", "roll_back", "save_step"]
