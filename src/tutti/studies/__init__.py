"""Studies: arms x data levels x seeds trained at an equal budget, their scores and the page about them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
