from .screen import Screening, screen_rate
from .verdict import judge_rates

__all__ = ["Screening", "judge_rates", "screen_rate"]
