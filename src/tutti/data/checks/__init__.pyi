from .pictures import check_pictures, glimpses
from .recordings import Recorded, Recordings
from .ridge import Leak, leak_findings, measure_leak, state_leak
from .rows import check_decoded, check_rows

__all__ = [
    "Leak",
    "Recorded",
    "Recordings",
    "check_decoded",
    "check_pictures",
    "check_rows",
    "glimpses",
    "leak_findings",
    "measure_leak",
    "state_leak",
]
