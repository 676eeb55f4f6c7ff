from .gradient_mask import GradientMask
from .k_gradients import KGradientsBackward
from .masked import MaskedBackward
from .one import Backward, OneBackward, OneBackwardConfig
from .term_gradients import Gradients, averaged_gradients, term_gradients
from .union import BackwardConfig
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
