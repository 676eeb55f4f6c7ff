from .config import CanonicalConfig, ConventionsConfig
from .served import Served

__all__ = ["CanonicalConfig", "ConventionsConfig", "Served"]
