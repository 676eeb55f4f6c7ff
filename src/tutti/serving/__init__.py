"""A trained policy: images, state and instruction in, actions in data units out; its export."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
