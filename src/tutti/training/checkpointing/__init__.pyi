from .recovery import restore
from .resume import RunSettings
from .saver import Saver

__all__ = ["RunSettings", "Saver", "restore"]
