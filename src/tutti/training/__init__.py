"""Training: the trainer, its configuration and state, and the observers of an update.

Its folders, each of which imports only those before it: optim, backward, parallel, checkpointing, faults,
diagnostics.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
