from .config import ModelConfig
from .describe import Description
from .interfaces import ActionDecoder, Fusion, LanguageEncoder, VisionEncoder
from .vla import VLA

__all__ = [
    "VLA",
    "ActionDecoder",
    "Description",
    "Fusion",
    "LanguageEncoder",
    "ModelConfig",
    "VisionEncoder",
]
