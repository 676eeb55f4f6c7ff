"""A run: its folder, the one builder of its training, its summary, and what it prints."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
