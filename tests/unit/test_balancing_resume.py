"""Every balancing trains through the real Trainer, and a resumed run ends with the same bits."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fixtures.balanced_training import SCHEDULES, SHARES, STEPS, compiled_and_eager, resumes, trainer
from fixtures.ranks import on_ranks
from fixtures.toy_training import Data
from tutti.objectives.balancing.shares import SharesBalancing, SharesBalancingConfig
from tutti.objectives.unified import UnifiedLoss
from tutti.training.parallel.fsdp import Fsdp
from tutti.types import UserError

EXAMPLES = Path(__file__).parents[2] / "examples"
BALANCINGS: dict[str, dict[str, Any]] = {
    "shares": {"of": ("align", "recon"), "start": 4, "steps": 5},  # the cut lies within
    "uncertainty": {"learning_rate": 0.05},
    "dwa": {"every": 2},
    "rlw": {"seed": 3},
    "famo": {},
    "own_balancing:EqualLosses": {},
}


@pytest.mark.parametrize("kind", BALANCINGS)
def test_every_balancing_trains_and_resumes(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "own_balancing", raising=False)
    options = {"options": BALANCINGS[kind]} if ":" in kind else BALANCINGS[kind]
    found = resumes(tmp_path, {"kind": kind, **options}, {"kind": "one"})
    lambdas = {name: value for name, value in found.counters.latest.items() if name.startswith("lambda/")}
    assert lambdas["lambda/action"] > 0
    assert lambdas["lambda/align"] != pytest.approx(0.3, rel=1e-6)


class Twice(SharesBalancing):
    """Notes what it is told before and after each update."""

    def __init__(self) -> None:
        super().__init__(SCHEDULES, SharesBalancingConfig())
        self.told: list[tuple[dict[str, float], dict[str, float]]] = []

    @property
    def needs_losses_after_step(self) -> bool:
        return True

    def reevaluate(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        self.told.append((dict(before), dict(after)))


def test_the_second_look_draws_what_the_first_drew_so_that_only_the_weights_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model has dropout: with weights that stay where they are, the two looks agree to the last bit."""
    watched = Twice()
    still = trainer(tmp_path / "still", {"kind": "shares"}, {"kind": "one"})
    cast("UnifiedLoss", still.objective).balancing = watched
    monkeypatch.setattr(still.optimizer, "step", lambda: None)
    still.fit(Data())
    assert len(watched.told) == STEPS
    assert all(before == after for before, after in watched.told)


def test_the_second_look_sees_the_update_and_leaves_the_training_alone(tmp_path: Path) -> None:
    watched = Twice()
    one, other = (trainer(tmp_path / name, {"kind": "shares"}, {"kind": "one"}) for name in ("a", "b"))
    cast("UnifiedLoss", one.objective).balancing = watched
    one.fit(Data())
    other.fit(Data())
    assert all(before["action"] != after["action"] for before, after in watched.told)
    expected = other.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in one.model.state_dict().items())


def test_a_balancing_that_observes_gradients_is_refused_where_there_are_none(tmp_path: Path) -> None:
    """One process that has as much of a single term's gradient as FSDP: nothing."""
    run = trainer(tmp_path, SHARES, {"kind": "one"})
    run.parallel.require_term_gradients = partial(Fsdp.require_term_gradients, run.parallel)
    with pytest.raises(UserError, match=r"fsdp with a share of a term.*\.kind=ddp"):
        run.fit(Data())
    assert run.step == 0


def test_shares_are_measured_over_what_the_mask_lets_through(tmp_path: Path) -> None:
    """Action may not move the stem, which is all that recon shares with it: its lambda is its plain share."""
    free = trainer(tmp_path / "a", SHARES, {"kind": "one"})
    masked = trainer(
        tmp_path / "b",
        SHARES,
        {"kind": "masked", "may_train": {"action": ["action", "norm", "state", "token"]}},
    )
    found: list[dict[str, float]] = []
    for run in (free, masked):
        run.fit(Data())
        balancing = cast("SharesBalancing", cast("UnifiedLoss", run.objective).balancing)
        found.append(dict(zip(balancing.names, balancing.factor.tolist(), strict=True)))
    assert found[0]["recon"] != 1.0 and found[1]["recon"] == 1.0
    assert found[1]["align"] not in (1.0, found[0]["align"])  # it shares the words with action, still


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one", "k_gradients"])
def test_shares_and_k_gradients_work_on_a_compiled_model(kind: str, tmp_path: Path) -> None:
    """In a process without the shape checks of the tests, which torch.compile cannot follow."""
    assert on_ranks(1, compiled_and_eager, tmp_path, kind)[0] < 2e-5
