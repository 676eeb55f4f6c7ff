"""Action decoders: one file a decoder, all of them subclasses of `ActionDecoder`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
