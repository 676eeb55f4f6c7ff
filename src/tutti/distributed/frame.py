"""A nested state without its tensors, and the tensors by name: what can be shared out, and what cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

MARK = "tutti.tensor"
"""The key of the one-entry mapping that stands where a tensor was."""


def taken_out(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` with each tensor in it moved to `tensors`, under the path of keys that leads to it.

    {"state": {0: {"momentum": T}}} under the name "muon" becomes {"state": {0: {"momentum": {MARK:
    "muon/state/0/momentum"}}}} and T.
    """
    if isinstance(value, Tensor):
        tensors[name] = value
        return {MARK: name}
    if isinstance(value, Mapping):
        return {key: taken_out(item, f"{name}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(taken_out(item, f"{name}/{place}", tensors) for place, item in enumerate(value))
    return value


def put_in(frame: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The opposite of `taken_out`.

    Raises: KeyError if a tensor is missing.
    """
    if isinstance(frame, Mapping):
        if list(frame) == [MARK]:
            return tensors[frame[MARK]]
        return {key: put_in(item, tensors) for key, item in frame.items()}
    if isinstance(frame, list | tuple):
        return type(frame)(put_in(item, tensors) for item in frame)
    return frame
