from .actions import ChunkConfig, ChunkTerm, InverseDynamicsConfig, InverseDynamicsTerm
from .alignment import ContrastiveConfig, ContrastiveTerm, SigmoidConfig, SigmoidTerm
from .future_latent import FutureLatentConfig, FutureLatentTerm
from .masked_patches import MaskedPatchesConfig, MaskedPatchesTerm
from .next_token import NextTokenConfig, NextTokenTerm
from .patches import ChangedPatchesConfig, FuturePatchesConfig, FuturePatchesTerm
from .recoverable_language import RecoverableLanguageConfig, RecoverableLanguageTerm
from .state_contrastive import StateContrastiveConfig, StateContrastiveTerm
from .states import FutureStatesConfig, FutureStatesTerm, ProgressConfig, ProgressTerm

__all__ = [
    "ChangedPatchesConfig",
    "ChunkConfig",
    "ChunkTerm",
    "ContrastiveConfig",
    "ContrastiveTerm",
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
    "NextTokenConfig",
    "NextTokenTerm",
    "ProgressConfig",
    "ProgressTerm",
    "RecoverableLanguageConfig",
    "RecoverableLanguageTerm",
    "SigmoidConfig",
    "SigmoidTerm",
    "StateContrastiveConfig",
    "StateContrastiveTerm",
]
