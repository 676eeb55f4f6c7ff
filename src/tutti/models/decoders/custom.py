"""A decoder of the user's own, named in the config as `kind: "package.module:Class"`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tutti.models.parts import ActionDecoder
from tutti.plugin import PATTERN, make
from tutti.types import DataSpec


class CustomDecoderConfig(BaseModel):
    """`kind: "package.module:Class"`. It is called as `Class(spec, width, **options)`.

    The class must be a `tutti.models.parts.ActionDecoder`; `width` is the d of the readout and of the fused
    vision tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str = Field(pattern=PATTERN, description="package.module:Class")
    options: dict[str, Any] = {}

    def build(self, spec: DataSpec, width: int) -> ActionDecoder:
        """The decoder. Raises UserError, naming the class, if it cannot be had or is no ActionDecoder."""
        return make(self.kind, ActionDecoder, "model.action.kind", spec, width, options=self.options)
