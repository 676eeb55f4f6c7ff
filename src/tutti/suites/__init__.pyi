from .environment import Environment, Suite
from .registry import SUITES, find_suite, fit_suite
from .workers import WorkerError, run_jobs

__all__ = ["SUITES", "Environment", "Suite", "WorkerError", "find_suite", "fit_suite", "run_jobs"]
