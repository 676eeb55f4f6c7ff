from .action import ChunkConfig, ChunkTerm
from .contrastive import ContrastiveConfig, ContrastiveTerm
from .future_latent import FutureLatentConfig, FutureLatentTerm
from .future_patches import ChangedPatchesConfig, FuturePatchesConfig, FuturePatchesTerm
from .future_states import FutureStatesConfig, FutureStatesTerm
from .inverse_dynamics import InverseDynamicsConfig, InverseDynamicsTerm
from .kinds import CustomTermConfig, TermConfig
from .masked_patches import MaskedPatchesConfig, MaskedPatchesTerm
from .progress import ProgressConfig, ProgressTerm
from .recoverable_language import RecoverableLanguageConfig, RecoverableLanguageTerm
from .sigmoid import SigmoidConfig, SigmoidTerm
from .state_contrastive import StateContrastiveConfig, StateContrastiveTerm

__all__ = [
    "ChangedPatchesConfig",
    "ChunkConfig",
    "ChunkTerm",
    "ContrastiveConfig",
    "ContrastiveTerm",
    "CustomTermConfig",
    "FutureLatentConfig",
    "FutureLatentTerm",
    "FuturePatchesConfig",
    "FuturePatchesTerm",
    "FutureStatesConfig",
    "FutureStatesTerm",
    "InverseDynamicsConfig",
    "InverseDynamicsTerm",
    "MaskedPatchesConfig",
    "MaskedPatchesTerm",
    "ProgressConfig",
    "ProgressTerm",
    "RecoverableLanguageConfig",
    "RecoverableLanguageTerm",
    "SigmoidConfig",
    "SigmoidTerm",
    "StateContrastiveConfig",
    "StateContrastiveTerm",
    "TermConfig",
]
