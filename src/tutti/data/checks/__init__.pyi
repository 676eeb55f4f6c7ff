from .recordings import check_recordings
from .ridge import Leak, leak_findings, measure_leak, state_leak

__all__ = ["Leak", "check_recordings", "leak_findings", "measure_leak", "state_leak"]
