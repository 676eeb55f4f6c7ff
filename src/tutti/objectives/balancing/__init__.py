"""Balancing: how the weights lambda_i are chosen; one file a method."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
