from .bins import BinsConfig, BinsDecoder
from .diffusion import DiffusionConfig, DiffusionDecoder
from .fast import FastConfig, FastDecoder
from .flow import FlowConfig, FlowDecoder
from .regression import RegressionConfig, RegressionDecoder

__all__ = [
    "BinsConfig",
    "BinsDecoder",
    "DiffusionConfig",
    "DiffusionDecoder",
    "FastConfig",
    "FastDecoder",
    "FlowConfig",
    "FlowDecoder",
    "RegressionConfig",
    "RegressionDecoder",
]
