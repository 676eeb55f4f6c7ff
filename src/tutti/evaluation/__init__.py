"""Evaluation: success rates in a simulator, open-loop error on held-out episodes, probes, statistics."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
