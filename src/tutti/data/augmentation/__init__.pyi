from .changes import PictureChanges, RawBatch
from .config import Augmentation, ColourJitter, NoAugmentation, PictureJitter
from .draws import raw_batch

__all__ = [
    "Augmentation",
    "ColourJitter",
    "NoAugmentation",
    "PictureChanges",
    "PictureJitter",
    "RawBatch",
    "raw_batch",
]
