from .bins import BinsConfig, BinsDecoder
from .denoising import DiffusionConfig, DiffusionDecoder, FlowConfig, FlowDecoder
from .fast import FastConfig, FastDecoder
from .pi0 import Pi0Config, Pi0Decoder
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
    "Pi0Config",
    "Pi0Decoder",
    "RegressionConfig",
    "RegressionDecoder",
]
