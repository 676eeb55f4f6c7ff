"""Predicts memory, FLOPs, traffic and time of a training before it runs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
