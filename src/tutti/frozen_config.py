"""Base class of every section of a config: immutable, unknown keys are errors, nothing is converted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator


class FrozenConfig(BaseModel):
    """Keys as fields, checked by pydantic; a subclass adds fields and what they build.

    A number is a number: neither text nor true or false, as pydantic would have it, nor infinite or NaN. A
    truth value is no number and no text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _as_given(cls, raw: Any, validate: Callable[[Any], Self]) -> Self:
        config = validate(raw)
        for key, given in raw.items() if isinstance(raw, Mapping) else ():
            if expected := _converted(given, getattr(config, key, given)):
                raise ValueError(f"{key} is {given!r:.60}; expected {expected}")
        return config


def heads_divide(config: Any) -> Any:
    """A validator: the attention `heads` of a config must divide its `width`."""
    if config.width % config.heads:
        raise ValueError(
            f"width {config.width} is not divisible by heads {config.heads}; choose a width that is"
        )
    return config


def _converted(raw: Any, value: Any) -> str:
    """What was expected where, somewhere inside, a value of another kind became a number or a truth value."""
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(raw, list | tuple) and isinstance(value, list | tuple):
        pairs = zip(raw, value, strict=False)
    elif isinstance(raw, Mapping) and isinstance(value, Mapping):
        pairs = [(raw[key], value[key]) for key in raw.keys() & value.keys()]
    elif isinstance(raw, str | bool) and type(value) in (int, float):
        return "a number, not a text or a truth value"
    elif isinstance(value, bool) and not isinstance(raw, bool):
        return "true or false"
    return next(filter(None, (_converted(*pair) for pair in pairs)), "")
