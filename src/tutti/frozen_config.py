"""Base class of every section of a config: immutable, and an unknown key is an error."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class FrozenConfig(BaseModel):
    """Keys as fields, checked by pydantic; a subclass adds fields and what they build."""

    model_config = ConfigDict(frozen=True, extra="forbid")
