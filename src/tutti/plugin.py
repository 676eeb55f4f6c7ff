"""Classes of the user's own in a config: `kind: "package.module:Class"` behaves like a kind of ours."""

from __future__ import annotations

import importlib
import re
from typing import Any, TypeVar

from tutti.types import UserError

T = TypeVar("T")

CUSTOM = "package.module:Class"
"""The tag, in a union of kinds, of any `kind` with a colon in it."""
PATTERN = r"^[\w.]+:\w+$"


def tag_of(given: Any) -> str | None:
    """The discriminator of such a union: the `kind` of a config or a mapping, or CUSTOM."""
    kind = given.get("kind") if isinstance(given, dict) else getattr(given, "kind", None)
    return CUSTOM if isinstance(kind, str) and ":" in kind else kind


def find_class(kind: str, base: type[T], key: str) -> type[T]:
    """The class that `kind` names. `key` is where it stands in the config, for messages.

    Raises: UserError if it cannot be imported or is no subclass of `base`.
    """
    module_name, _, class_name = kind.partition(":")
    assert re.match(PATTERN, kind), kind
    wanted = f"{base.__module__}.{base.__name__}"
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{key} is '{kind}', but '{module_name}' cannot be imported: {error}. Install it, or "
            f"run with its folder on PYTHONPATH (PYTHONPATH=. for a file beside you)."
        ) from error
    found = getattr(module, class_name, None)
    if isinstance(found, type) and issubclass(found, base):
        return found
    have = sorted(
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and value is not base
    )
    what = "no such name" if found is None else f"{found!r}"
    raise UserError(
        f"{key} is '{kind}': expected a subclass of {wanted}, found {what}. "
        f"Such classes in {module.__file__}: {', '.join(have) or 'none'}."
    )


def make(kind: str, base: type[T], key: str, *arguments: Any, options: dict[str, Any], **own: Any) -> T:
    """An instance: `Class(*arguments, **options, **own)`.

    Raises: UserError as `find_class`, or if the class does not take these options.
    """
    found = find_class(kind, base, key)
    try:
        return found(*arguments, **options, **own)
    except TypeError as error:
        raise UserError(f"{key}: {kind} does not accept options {sorted(options)}: {error}.") from error
