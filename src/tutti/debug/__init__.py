"""Finds what is wrong with a run: doctor before it, probes and replays after it, proof of an exact resume."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
