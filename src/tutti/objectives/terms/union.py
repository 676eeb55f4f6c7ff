"""The union of all terms: what `objective.<name>` may be in a config, told apart by `kind`.

A further term is one file beside this one and two lines here: its import and its place in `TermConfig`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Tag

from tutti.objectives.terms.action import ChunkConfig
from tutti.objectives.terms.changed_patches import ChangedPatchesConfig
from tutti.objectives.terms.contrastive import ContrastiveConfig
from tutti.objectives.terms.custom import CustomTermConfig
from tutti.objectives.terms.future_latent import FutureLatentConfig
from tutti.objectives.terms.future_patches import FuturePatchesConfig
from tutti.objectives.terms.future_states import FutureStatesConfig
from tutti.objectives.terms.inverse_dynamics import InverseDynamicsConfig
from tutti.objectives.terms.masked_patches import MaskedPatchesConfig
from tutti.objectives.terms.progress import ProgressConfig
from tutti.objectives.terms.recoverable_language import RecoverableLanguageConfig
from tutti.objectives.terms.sigmoid import SigmoidConfig
from tutti.objectives.terms.state_contrastive import StateContrastiveConfig
from tutti.plugin import CUSTOM, tag_of

TermConfig = Annotated[
    Annotated[ContrastiveConfig, Tag("contrastive")]
    | Annotated[SigmoidConfig, Tag("sigmoid")]
    | Annotated[StateContrastiveConfig, Tag("state_contrastive")]
    | Annotated[RecoverableLanguageConfig, Tag("recoverable_language")]
    | Annotated[FutureLatentConfig, Tag("future_latent")]
    | Annotated[ProgressConfig, Tag("progress")]
    | Annotated[ChunkConfig, Tag("chunk")]
    | Annotated[FuturePatchesConfig, Tag("future_patches")]
    | Annotated[ChangedPatchesConfig, Tag("changed_patches")]
    | Annotated[MaskedPatchesConfig, Tag("masked_patches")]
    | Annotated[InverseDynamicsConfig, Tag("inverse_dynamics")]
    | Annotated[FutureStatesConfig, Tag("future_states")]
    | Annotated[CustomTermConfig, Tag(CUSTOM)],
    Discriminator(tag_of),
]
