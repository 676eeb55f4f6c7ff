"""Checks of recorded data that need no model; training and `tutti doctor` run them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
