from .gradient_mask import GradientMask
from .interface import Backward, OneBackward, OneBackwardConfig
from .k_gradients import KGradientsBackward
from .kinds import BackwardConfig
from .masked import MaskedBackward
from .term_gradients import Gradients, averaged_gradients, term_gradients
from .weightings import Weighting

__all__ = [
    "Backward",
    "BackwardConfig",
    "GradientMask",
    "Gradients",
    "KGradientsBackward",
    "MaskedBackward",
    "OneBackward",
    "OneBackwardConfig",
    "Weighting",
    "averaged_gradients",
    "term_gradients",
]
