"""Watching for trouble: non-finite values stop the run before the optimiser moves, and can be replayed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from tutti.storage.checkpoint import deserialize, serialize
from tutti.storage.files import explain_disk_errors, write_folder
from tutti.types import Batch, Future, LaterStates, Observation, UserError


class NonFiniteError(UserError):
    """A loss term or the gradient is NaN or infinite. The optimiser has not moved.

    `term` is the term's name, "total" or "gradient"; `step` the number of the update that did not happen.
    """

    def __init__(self, message: str, *, term: str, step: int, windows: list[int], folder: Path) -> None:
        super().__init__(message)
        self.term = term
        self.step = step
        self.windows = windows
        self.folder = folder


def non_finite(values: Mapping[str, float]) -> list[str]:
    """The names whose value is NaN or infinite."""
    return [name for name, value in values.items() if not math.isfinite(value)]


def _modules_of(parameters: Mapping[str, Parameter], bad: Sequence[str]) -> str:
    """The modules of the parameters `bad`, at two levels ("model.vision"), with the number in each."""
    depth = 2
    totals: dict[str, int] = {}
    counts: dict[str, int] = {}
    for name in parameters:
        module = ".".join(name.split(".")[:depth])
        totals[module] = totals.get(module, 0) + 1
        counts[module] = counts.get(module, 0) + (name in bad)
    return ", ".join(f"{module} ({n} of {totals[module]})" for module, n in counts.items() if n)


def non_finite_gradients(parameters: Mapping[str, Parameter]) -> list[str]:
    """The names of the parameters whose gradient has a NaN or infinity."""
    return [
        name
        for name, parameter in parameters.items()
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
    ]


def fail(
    run: Path,
    *,
    term: str,
    step: int,
    value: float,
    batches: Sequence[Batch],
    weights: Mapping[str, Mapping[str, Tensor]],
    parameters: Mapping[str, Parameter] | None = None,
    skipped: bool = False,
    ranks: Mapping[int, list[int]] | None = None,
) -> NonFiniteError:
    """Save what a replay needs under run/failures/step-XXXXXX/ and make the error that says so.

    `weights` are named state dicts; `parameters` are given when the gradient is at fault.
    `skipped`: the update is left out, and training goes on. `ranks`: of several, those at fault, with the
    windows of each.
    """
    windows = [window for batch in batches for window in batch.window.tolist()]
    where = named = ""
    if ranks:
        named = f" on rank {', '.join(map(str, ranks))}"
        windows = [window for own in ranks.values() for window in own]
    if parameters is not None:
        bad = non_finite_gradients(parameters)
        where = f" in {_modules_of(parameters, bad)}" if bad else " (its norm overflows)"
    folder = run / "failures" / f"step-{step:06d}"
    shown = ", ".join(str(window) for window in windows[:16]) + (", ..." if len(windows) > 16 else "")
    thing = f"the {term}" if term in ("gradient", "total") else f"the loss term '{term}'"
    message = (
        f"Step {step}: {thing} is {value}{where}{named}. Training stopped before the optimiser moved.\n"
        f"Windows of the batch{named}: {shown}.\n"
        f"Batch and weights are saved in {folder}; look at them: tutti replay {folder}\n"
        "Look for non-finite or extreme values in these windows; else lower training.optimizer.lr, lengthen "
        "training.schedule.warmup, or lower training.gradients.clip_norm."
    )
    about = {"step": step, "term": term, "value": str(value), "windows": windows, "message": message}
    if skipped:
        about["skipped"] = True
    save_step(folder, "failure.json", about, batches, weights)
    return NonFiniteError(message, term=term, step=step, windows=windows, folder=folder)


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
        own = {name: dict(tensors) for name, tensors in weights.items()}
        (temporary / "weights.pt").write_bytes(serialize(own))


def load_failure(folder: Path) -> tuple[list[Batch], dict[str, dict[str, Tensor]]]:
    """The batches of a saved step (failures/, spikes/), and the weights ("model", "objective") it met, on
    the CPU.

    Raises: UserError if they are of another form.
    """
    saved, weights = deserialize(folder / "batches.pt"), deserialize(folder / "weights.pt")
    try:
        batches = [batch_from_dict(item) for item in saved]
        named = {name: dict(own) for name, own in weights.items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        said = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"{folder}: batches.pt or weights.pt is of another form ({said}).") from error
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


def gradient_warnings(parameters: Mapping[str, Parameter]) -> list[str]:
    """One sentence for each parameter that the first backward pass did not reach, one for all whose gradient
    was exactly 0."""
    warnings: list[str] = []
    zero: list[str] = []
    for name, parameter in parameters.items():
        if parameter.grad is None:
            warnings.append(f"parameter {name} gets no gradient after the first step: no term depends on it")
        elif not bool(parameter.grad.any()):
            zero.append(name)
    if zero:
        warnings.append(
            f"{len(zero)} parameters, such as {zero[0]}, get a gradient of exactly 0 at first: right "
            "behind a layer that starts at zero, else a sign of dead units"
        )
    return warnings
