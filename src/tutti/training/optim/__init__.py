"""Optimisers, learning-rate schedules, gradient clipping and the moving average of the weights."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
