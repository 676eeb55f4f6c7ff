"""beartype as the checker of jaxtyping's import hook, which hands it methods one by one.

Outside a class that it decorates as a whole, beartype refuses `Self` (PEP 673). What a method returns of its
own class needs no check, so such an annotation is read as `object`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from beartype import beartype


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments and result checked at every call."""
    annotations = getattr(function, "__annotations__", {})
    for name, hint in annotations.items():
        if hint is Self or hint == "Self":
            annotations[name] = object
    return beartype(function)
