"""Diagnostics during training: gradients by term and part, noise scale, loss spikes, dead units."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
