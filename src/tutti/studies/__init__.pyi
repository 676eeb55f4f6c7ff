from .cells import Trained
from .compare import compare, read_plan
from .config import BudgetConfig, StudyConfig, load_study
from .scores import ArmScore, score_study

__all__ = [
    "ArmScore",
    "BudgetConfig",
    "StudyConfig",
    "Trained",
    "compare",
    "load_study",
    "read_plan",
    "score_study",
]
