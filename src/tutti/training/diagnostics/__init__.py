"""Measurements during training: gradients per term and module, noise scale, dead units."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
