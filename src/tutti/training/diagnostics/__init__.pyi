from .first_batch import FirstBatch
from .observer import Diagnostics, DiagnosticsConfig

__all__ = ["Diagnostics", "DiagnosticsConfig", "FirstBatch"]
