from .playing import Judge, Playing
from .recovery import restore
from .resume import RunSettings
from .saver import Saver

__all__ = ["Judge", "Playing", "RunSettings", "Saver", "restore"]
