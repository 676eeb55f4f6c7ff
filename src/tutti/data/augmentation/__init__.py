"""Augmentation of training pictures: what may change, how it is drawn, and how it is done on any device."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
