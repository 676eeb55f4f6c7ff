"""The config of a run: YAML, overrides, and errors that name the key. The names load at first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
