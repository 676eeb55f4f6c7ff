"""Non-finite losses and gradients: found, skipped, or answered with a rollback."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
