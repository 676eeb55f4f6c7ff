"""The union of all terms: what `objective.<name>` may be in a config, told apart by `kind`.

A further term is one file beside this one and two lines here: its import and its place in `TermConfig`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Tag

from tutti.objectives.action import ChunkConfig
from tutti.objectives.align import ContrastiveConfig
from tutti.objectives.custom import CustomTermConfig
from tutti.objectives.recon import FuturePatchesConfig
from tutti.objectives.state import FutureStatesConfig
from tutti.plugin import CUSTOM, tag_of

TermConfig = Annotated[
    Annotated[ContrastiveConfig, Tag("contrastive")]
    | Annotated[ChunkConfig, Tag("chunk")]
    | Annotated[FuturePatchesConfig, Tag("future_patches")]
    | Annotated[FutureStatesConfig, Tag("future_states")]
    | Annotated[CustomTermConfig, Tag(CUSTOM)],
    Discriminator(tag_of),
]
