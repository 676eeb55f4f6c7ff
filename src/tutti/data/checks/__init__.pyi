from .leak import Leak, leak_findings, measure_leak, state_leak
from .recordings import check_recordings

__all__ = ["Leak", "check_recordings", "leak_findings", "measure_leak", "state_leak"]
