"""The union of all kinds of `backward`. To add one: a file beside this one, its import and its line here."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Discriminator, Tag

from tutti.plugin import CUSTOM, CustomConfig, tag_of
from tutti.training.backward.interface import Backward, OneBackwardConfig
from tutti.training.backward.k_gradients import KGradientsConfig
from tutti.training.backward.masked import KnowledgeInsulationConfig, MaskedBackwardConfig


class CustomBackwardConfig(CustomConfig[Backward]):
    """`kind: "package.module:Class"`, a `Backward`: `Class(parameters, terms, **options)`.

    `parameters` are the trainable ones by name (model... or objective...), `terms` the names of the
    objective's terms.
    """

    base, key = Backward, "backward.kind"
    may_train: ClassVar[dict[str, tuple[str, ...]]] = {}
    """A custom class masks nothing that Tutti knows of."""


BackwardConfig = Annotated[
    Annotated[OneBackwardConfig, Tag("one")]
    | Annotated[MaskedBackwardConfig, Tag("masked")]
    | Annotated[KnowledgeInsulationConfig, Tag("knowledge_insulation")]
    | Annotated[KGradientsConfig, Tag("k_gradients")]
    | Annotated[CustomBackwardConfig, Tag(CUSTOM)],
    Discriminator(tag_of),
]
