"""The addresses of the project in the packages: those of the repository that a release is made for.

Nothing in the sources knows where the repository lies. With TUTTI_REPOSITORY=https://HOST/OWNER/NAME the
metadata name it and the pages below it; without the variable they name no address, rather than a wrong one.
"""

from __future__ import annotations

import os
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

PAGES = {
    "Documentation": "/blob/main/docs/index.md",
    "Changelog": "/blob/main/CHANGELOG.md",
    "Issues": "/issues",
}


class Addresses(MetadataHookInterface):
    """`[project.urls]`, which pyproject.toml says is dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Raises: ValueError unless the address begins with https://."""
        home = os.environ.get("TUTTI_REPOSITORY", "").rstrip("/")
        if home and not home.startswith("https://"):
            raise ValueError(f"TUTTI_REPOSITORY is {home!r}: expected https://HOST/OWNER/NAME.")
        metadata["urls"] = (
            {"Repository": home, **{name: home + path for name, path in PAGES.items()}} if home else {}
        )
