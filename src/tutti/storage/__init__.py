"""Files that survive a kill, and the folder of a checkpoint, for training and serving alike."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
