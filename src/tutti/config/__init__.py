"""The config of a run: YAML files, overrides, checks, and error messages that name the key."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
