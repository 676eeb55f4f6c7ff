from .build import BuiltTraining, build_data, build_parts, build_training, describe_model, trial_training
from .folder import RunFolder
from .summary import write_summary

__all__ = [
    "BuiltTraining",
    "RunFolder",
    "build_data",
    "build_parts",
    "build_training",
    "describe_model",
    "trial_training",
    "write_summary",
]
