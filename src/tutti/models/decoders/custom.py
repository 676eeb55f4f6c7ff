"""A decoder of the user's own, named in the config as `kind: "package.module:Class"`."""

from __future__ import annotations

from tutti.models.sockets import ActionDecoder
from tutti.plugin import CustomConfig
from tutti.types import DataSpec


class CustomDecoderConfig(CustomConfig):
    """`kind: "package.module:Class"`. It is called as `Class(spec, width, **options)`.

    The class must be a `tutti.models.sockets.ActionDecoder`; `width` is the d of the readout and of the fused
    vision tokens.
    """

    def build(self, spec: DataSpec, width: int) -> ActionDecoder:
        """The decoder. Raises UserError, naming the class, if it cannot be had or is no ActionDecoder."""
        return self.make(ActionDecoder, "model.action.kind", spec, width)
