"""Tuning: short trainings that find a learning rate before a long one begins."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
