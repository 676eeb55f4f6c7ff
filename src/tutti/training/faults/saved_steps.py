"""Steps saved for replay (failures/, spikes/): the batches of all ranks and the weights that they met."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutti.distributed.world import World
from tutti.storage.checkpoint import deserialize, serialize, step_of
from tutti.storage.files import explain_disk_errors, write_folder
from tutti.types import Batch, Future, LaterStates, Observation, UserError


def save_step(
    folder: Path,
    name: str,
    about: Mapping[str, Any],
    batches: Sequence[Batch],
    weights: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Save a step for replay, whole or not at all: its batches, its weights, and `about` it in file `name`.

    Raises: UserError if the disk is full.
    """
    with explain_disk_errors(folder), write_folder(folder) as temporary:
        (temporary / name).write_text(json.dumps(about, indent=1))
        saved = [batch_to_dict(batch) for batch in batches]
        (temporary / "batches.pt").write_bytes(serialize(saved))
        plain = {name: dict(tensors) for name, tensors in weights.items()}
        (temporary / "weights.pt").write_bytes(serialize(plain))


def load_step(folder: Path) -> tuple[list[Batch], dict[str, dict[str, Tensor]]]:
    """The batches of a saved step (failures/, spikes/) and its weights ("model", "objective"), on the CPU.

    Raises: UserError if they are of another form.
    """
    saved, weights = deserialize(folder / "batches.pt"), deserialize(folder / "weights.pt")
    try:
        batches = [batch_from_dict(item) for item in saved]
        named = {name: dict(tensors) for name, tensors in weights.items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"{folder}: batches.pt or weights.pt is of another form ({reason}).") from error
    return batches, named


def batch_to_dict(value: Any) -> dict[str, Any]:
    """A batch (or a part of one) as nested dicts of tensors and plain values, as it is saved."""

    def plain(item: Any) -> Any:
        if is_dataclass(item):
            return batch_to_dict(item)
        return {key: plain(entry) for key, entry in item.items()} if isinstance(item, Mapping) else item

    return {entry.name: plain(getattr(value, entry.name)) for entry in fields(value)}


def batch_from_dict(saved: dict[str, Any]) -> Batch:
    """The inverse of `batch_to_dict`."""
    states = saved["later_states"]
    parts = {
        "observation": Observation(**saved["observation"]),
        "futures": {
            offset: Future(observation=Observation(**future["observation"]), mask=future["mask"])
            for offset, future in saved["futures"].items()
        },
        "later_states": None if states is None else LaterStates(**states),
    }
    return Batch(**{**saved, **parts})


def keep_newest(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep` of the saved spikes in `folder`."""
    saved = sorted(folder.glob("step-*"), key=step_of)
    for old in saved[: len(saved) - keep]:
        shutil.rmtree(old, ignore_errors=True)


def gather_batches(world: World, batches: Sequence[Batch]) -> list[Batch]:
    """The whole batches whose rows the ranks hold, on the CPU; all ranks must call it."""
    if world.ranks.count == 1:
        return list(batches)
    parts = world.all_gather([batch_to_dict(batch.to("cpu")) for batch in batches])
    return [batch_from_dict(_concatenate(same)) for same in zip(*parts, strict=True)]


def _concatenate(parts: Sequence[Any]) -> Any:
    """Structures of the same form as one, their tensors concatenated along the rows."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, Mapping):
        return {key: _concatenate([part[key] for part in parts]) for key in first}
    return first
