from .compare import compare, read_plan
from .config import BudgetConfig, StudyConfig, load_study
from .run_cell import Trained, load_trained
from .scores import ArmScore, score_study

__all__ = [
    "ArmScore",
    "BudgetConfig",
    "StudyConfig",
    "Trained",
    "compare",
    "load_study",
    "load_trained",
    "read_plan",
    "score_study",
]
