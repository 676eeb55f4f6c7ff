from .config import TrainingConfig
from .data_feed import TrainingData, TrainLoader
from .records import read_records
from .state import Stateful, TrainState
from .strategy import StrategyConfig
from .trainer import Trainer
from .update import Observer, Update

__all__ = [
    "Observer",
    "Stateful",
    "StrategyConfig",
    "TrainLoader",
    "TrainState",
    "Trainer",
    "TrainingConfig",
    "TrainingData",
    "Update",
    "read_records",
]
