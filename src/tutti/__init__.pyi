from . import pipeline
from .config.run_config import RunConfig, load_config
from .errors import UserError
from .objectives.objective import Objective
from .objectives.term import Term
from .pipeline import evaluate, train
from .serving.policy import Policy

__version__: str
__all__ = [
    "Objective",
    "Policy",
    "RunConfig",
    "Term",
    "UserError",
    "__version__",
    "evaluate",
    "load_config",
    "pipeline",
    "train",
]
