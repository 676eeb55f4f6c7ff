"""The sources of a config: what each says of its data set, and what it uses of it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
