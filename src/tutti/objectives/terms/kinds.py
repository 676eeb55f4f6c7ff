"""Union of the configs of all terms: what `objective.<name>` may be, told apart by `kind`.

A further term is one file beside this one and two lines here: its import and its place in `TermConfig`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Tag

from tutti.objectives.term import BaseTermConfig, Model, Term
from tutti.objectives.terms.action import ChunkConfig
from tutti.objectives.terms.contrastive import ContrastiveConfig
from tutti.objectives.terms.future_latent import FutureLatentConfig
from tutti.objectives.terms.future_patches import ChangedPatchesConfig, FuturePatchesConfig
from tutti.objectives.terms.future_states import FutureStatesConfig
from tutti.objectives.terms.inverse_dynamics import InverseDynamicsConfig
from tutti.objectives.terms.masked_patches import MaskedPatchesConfig
from tutti.objectives.terms.progress import ProgressConfig
from tutti.objectives.terms.recoverable_language import RecoverableLanguageConfig
from tutti.objectives.terms.sigmoid import SigmoidConfig
from tutti.objectives.terms.state_contrastive import StateContrastiveConfig
from tutti.plugin import CUSTOM, CustomConfig, tag_of
from tutti.types import DataNeeds


class CustomTermConfig(CustomConfig[Term], BaseTermConfig):
    """`kind: "package.module:Class"`, a `Term`: called as `Class(model, **options, **term)`.

    `term` is for its `super().__init__`: the name, the boundaries where gradients stop, the needed data.
    """

    base = Term

    def needs(self, name: str) -> DataNeeds:
        """What the class asks for: `Class.needs(**options)`."""
        key = f"objective.{name}.kind"
        return self.call(self.find(key).needs, key)

    def build(self, model: Model, name: str) -> Term:
        """The term called `name`. Raises UserError, naming the class, if it cannot be made."""
        key = f"objective.{name}.kind"
        term = {"name": name, "stop_gradient": self.stop_gradient, "needed": self.needs(name)}
        return self.call(self.find(key), key, model, **term)


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
