"""Intervals of success rates, and paired comparisons of arms over training seeds and starts."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
