from .aggregators import Weighting
from .config import BackwardConfig
from .interface import Backward, OneBackward, OneBackwardConfig
from .k_gradients import KGradientsBackward
from .masked import BackwardUnderMask, MaskedBackward
from .term_gradients import Gradients, averaged_gradients, term_gradients

__all__ = [
    "Backward",
    "BackwardConfig",
    "BackwardUnderMask",
    "Gradients",
    "KGradientsBackward",
    "MaskedBackward",
    "OneBackward",
    "OneBackwardConfig",
    "Weighting",
    "averaged_gradients",
    "term_gradients",
]
