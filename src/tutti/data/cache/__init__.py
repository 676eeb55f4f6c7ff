"""The frame cache: decoded, resized frames in memory-mapped files, or decoded again for each batch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
