from .all import judge_records
from .curves import judge_curves
from .diagnostic_records import DiagnosticRecords, read_diagnostics
from .diagnostics import judge_diagnostics

__all__ = [
    "DiagnosticRecords",
    "judge_curves",
    "judge_diagnostics",
    "judge_records",
    "read_diagnostics",
]
