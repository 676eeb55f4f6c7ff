"""Config of the frame cache: where decoded pictures are kept, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from tutti.frozen_config import FrozenConfig
from tutti.storage.files import LocalPath, cache_home

CacheKind = Literal["raw", "jpeg", "none"]
"""How pictures are kept."""


class CacheConfig(FrozenConfig):
    """How decoded pictures are kept for all runs, and where. It is always safe to delete that folder."""

    kind: CacheKind | Literal["auto"] = Field(
        default="raw",
        description="raw: bytes as decoded. jpeg: about a tenth of them, other pictures. none: no picture is "
        "written, each batch decodes its pictures. auto: the first of these that the disk has room for.",
    )
    quality: int = Field(default=90, ge=1, le=100, description="Of kind jpeg.")
    folder: Literal["auto"] | LocalPath = Field(
        default="auto", description="auto: $TUTTI_CACHE, else $XDG_CACHE_HOME/tutti, else ~/.cache/tutti."
    )
    memory: int = Field(
        default=256, ge=0, description="MiB of pictures of each data set that kind none keeps, the last used."
    )
    threads: int = Field(default=1, ge=1, le=256, description="Threads that decode a batch (jpeg, none).")

    def home(self) -> Path:
        """The folder. Raises: UserError if `~` or a `$VAR` in the environment's own says nothing."""
        if self.folder != "auto":
            return self.folder
        return cache_home()
