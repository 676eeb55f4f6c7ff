"""An update that is left out leaves no trace: in no balancing, in no backward, in no calibration."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

import pytest

from fixtures.balanced_training import SHARES, STEPS, trainer
from fixtures.run_equality import leaves, records, unequal
from fixtures.toy_training import Data
from tutti.training.trainer import Trainer
from tutti.types import Batch

BAD = 5
"""The update that is left out, from 1."""
SKIP: dict[str, Any] = {"gradients": {"non_finite": "skip"}, "accumulation": 1, "log_every": 1}
SHARE: dict[str, Any] = SHARES | {"start": 3, "steps": 4}
BALANCINGS: list[dict[str, Any]] = [
    {"kind": "uncertainty", "learning_rate": 0.1},
    {"kind": "dwa", "every": 2},
    {"kind": "rlw"},
    {"kind": "famo"},
    SHARE | {"start": 4},
]


def spoiled(*numbers: int) -> Data:
    """Data whose batches of these numbers, from 1, hold an action that is not finite."""

    def change(number: int, batch: Batch) -> Batch:
        if number + 1 in numbers:
            batch.actions[1, 0, 0] = float("nan")
        return batch

    return Data(change)


def states(run: Path, balancing: dict[str, Any], backward: dict[str, Any], *, by_gradient: bool) -> list[Any]:
    """What balancing and backward keep after each update; update `BAD` has a loss, or only a gradient of a
    head, that is not finite."""
    found: list[Any] = []

    def note(step: int, *_: object) -> None:
        kept = {**one.objective.balancing.state_dict(), "backward": one.backward.state_dict()}  # type: ignore[union-attr]
        found.append(leaves(copy.deepcopy(kept)))

    one: Trainer = trainer(run, balancing, backward, note, **SKIP)
    if by_gradient:
        head = one.parameters["objective.terms.recon.head.weight"]
        head.register_hook(lambda gradient: gradient * (float("nan") if one.step + 1 == BAD else 1.0))
    one.fit(Data() if by_gradient else spoiled(BAD))
    assert one.fault_policy.skipped == 1
    return found


@pytest.mark.parametrize("balancing", BALANCINGS, ids=lambda one: one["kind"])
def test_a_balancing_is_as_it_was(balancing: dict[str, Any], tmp_path: Path) -> None:
    found = states(tmp_path, balancing, {"kind": "one"}, by_gradient=balancing["kind"] == "shares")
    assert unequal(found[BAD - 1], found[BAD - 2]) == []
    assert unequal(found[BAD], found[BAD - 1])  # it would have moved


@pytest.mark.parametrize("kind", ["gradvac", "pcd", "cosine_gate"])
def test_a_backward_is_as_it_was(kind: str, tmp_path: Path) -> None:
    backward = {"kind": "k_gradients", "scope": "part", "aggregator": {"kind": kind}}
    found = states(tmp_path, {"kind": "shares"}, backward, by_gradient=True)
    assert unequal(found[BAD - 1], found[BAD - 2]) == []


def test_a_calibration_without_some_of_its_updates_gives_nearly_the_same(tmp_path: Path) -> None:
    factors = []
    for name, bad in (("whole", ()), ("first", (4,)), ("inside", (5,)), ("both ends", (4, 7))):
        one = trainer(tmp_path / name, SHARE, {"kind": "one"}, **SKIP)
        one.fit(spoiled(*bad))
        factors.append(one.objective.balancing.factor)  # type: ignore[union-attr]
    whole, *others = factors
    assert not bool((whole == 1).all())
    for found in others:
        assert bool((found / whole > 0.5).all()) and bool((found / whole < 2).all())


def test_a_calibration_with_skipped_updates_resumes_exactly(tmp_path: Path) -> None:
    settings = SKIP | {"checkpoints": {"every": 0}, "validation": {"every": 0}}
    trainer(tmp_path / "straight", SHARE, {"kind": "one"}, **settings).fit(spoiled(5, 7))
    straight = records(tmp_path / "straight")
    for cut in (4, 6, 7):  # inside of the window, and between its end and what is frozen then

        def stop(step: int, *_: object, cut: int = cut) -> None:
            if step == cut:
                signal.raise_signal(signal.SIGINT)

        run = tmp_path / f"cut-{cut}"
        with pytest.raises(KeyboardInterrupt):
            trainer(run, SHARE, {"kind": "one"}, stop, **settings).fit(spoiled(5, 7))
        trainer(run, SHARE, {"kind": "one"}, **settings).fit(spoiled(5, 7))
        assert records(run) == straight and straight[-1]["step"] == STEPS
