"""Two runs compared to the last bit: newest checkpoint with all its state, and records without times.

Python's own random state is left out: the shape checks that run in tests draw from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fixtures.checkpoints import load_latest
from training_world import Data, make_trainer
from tutti.training.records import read_records
from tutti.training.trainer import Trainer

OF_THE_PLACE = ("seconds", "metrics", "training", "versions", "files")


class Killed(Exception):
    """What a test throws in the middle of a run, where nothing is saved."""


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """All values of a nested structure by their path."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in leaves(item, f"{name}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for key, item in enumerate(value) for k, v in leaves(item, f"{name}/{key}").items()}
    return {name: value}


def content(run: Path) -> dict[str, Any]:
    saved = load_latest(run)
    assert saved is not None
    state = {name: value for name, value in saved.state.items() if name not in OF_THE_PLACE}
    rng = {name: value for name, value in saved.rng.items() if name != "python"}
    return leaves({"tensors": saved.tensors, "optimizer": saved.optimizer, "rng": rng, "state": state})


def records(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in read_records(run)]


def differing(one: Path, other: Path) -> list[str]:
    """The paths of the values that are not equal to the last bit, of checkpoints and records."""
    a, b = content(one), content(other)
    names = list(a.keys() ^ b.keys())
    for name in a.keys() & b.keys():
        same = torch.equal(a[name], b[name]) if isinstance(a[name], Tensor) else a[name] == b[name]
        names += [] if same else [name]
    return names + ([] if records(one) == records(other) else ["records"])


def killed_and_resumed(run: Path, at: tuple[int, ...], data: Any = Data, **settings: Any) -> Trainer:
    """A run that is stopped without saving when it has made as many updates as `at` says, and begun again."""
    for count in at:
        made = 0

        def stop(step: int, steps: int, metrics: dict[str, float], count: int = count) -> None:
            nonlocal made
            made += 1
            if made == count:
                raise Killed

        try:
            make_trainer(run, progress=stop, **settings).fit(data())
        except Killed:
            continue
        raise AssertionError(f"the run ended before {count} updates")
    trainer = make_trainer(run, **settings)
    trainer.fit(data())
    return trainer
