from .bins import BinsConfig, BinsDecoder
from .denoising import DiffusionConfig, DiffusionDecoder, FlowConfig, FlowDecoder
from .fast import FastConfig, FastDecoder
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
