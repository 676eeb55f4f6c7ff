from .objective import Objective
from .term import Model, Term, TermValue
from .unified import ObjectiveConfig, UnifiedLoss
from .weight_schedule import WeightSchedule

__all__ = [
    "Model",
    "Objective",
    "ObjectiveConfig",
    "Term",
    "TermValue",
    "UnifiedLoss",
    "WeightSchedule",
]
