"""Conventions of states and actions: what their numbers mean, the one form that is learned, and back."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
