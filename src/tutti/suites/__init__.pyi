from .environment import Environment, EnvironmentFactory, RecordableEnvironment, Suite
from .registry import SUITES, find_suite, fit_suite
from .workers import WorkerError, Workers

__all__ = [
    "SUITES",
    "Environment",
    "EnvironmentFactory",
    "RecordableEnvironment",
    "Suite",
    "WorkerError",
    "Workers",
    "find_suite",
    "fit_suite",
]
