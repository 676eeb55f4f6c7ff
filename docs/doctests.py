"""What mkdocstrings does to docstrings before it shows them."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Fences the examples in docstrings, which Markdown takes for quotations."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Of every object whose sources were read."""
        if obj.docstring and ">>>" in obj.docstring.value:
            value = re.sub(
                r"(?:^>>> .*\n?(?:.+\n?)*)+", r"```pycon\n\g<0>\n```\n", obj.docstring.value, flags=re.M
            )
            obj.docstring.value = value
