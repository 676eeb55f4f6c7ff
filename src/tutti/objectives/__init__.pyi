from .config import BalancingConfig, CustomBalancingConfig, CustomTermConfig, ObjectiveConfig, TermConfig
from .objective import Objective
from .term import Model, Term, TermValue
from .unified import UnifiedLoss
from .weight_schedule import WeightSchedule

__all__ = [
    "BalancingConfig",
    "CustomBalancingConfig",
    "CustomTermConfig",
    "Model",
    "Objective",
    "ObjectiveConfig",
    "Term",
    "TermConfig",
    "TermValue",
    "UnifiedLoss",
    "WeightSchedule",
]
