"""The benchmarks of rollouts and of intervals: what is exact, and mechanisms that play another rollout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import interval_coverage
import numpy as np
import pytest
import rollout_throughput
from scipy import stats

from tutti.evaluation.closed_loop.rollouts import PlannedRollout
from tutti.types import UserError


def test_coverage_is_the_share_of_rollouts_whose_interval_holds_the_rate() -> None:
    for rate in (0.05, 0.5, 0.99):
        assert interval_coverage.coverage("Clopper and Pearson", 20, rate) >= 0.95
    # At 99 % of 10 rollouts Wald's interval misses where all succeed, for it has no width there.
    missed = stats.binom.pmf(10, 10, 0.99)
    assert interval_coverage.coverage("Wald", 10, 0.99) == pytest.approx(1 - missed, abs=1e-3)
    drawn = np.random.default_rng(0).binomial(20, 0.9, 4000)
    low, high = interval_coverage.bounds("Wilson", 20)[drawn].T
    simulated = ((low <= 0.9) & (high >= 0.9)).mean()
    assert interval_coverage.coverage("Wilson", 20, 0.9) == pytest.approx(simulated, abs=0.02)


def test_the_table_of_coverage_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interval_coverage, "TASKS", interval_coverage.TASKS[2:3])
    monkeypatch.setattr(interval_coverage, "STARTS", (20,))
    assert interval_coverage.main(["--runs", "40", "--output", str(tmp_path / "coverage")]) == 0
    found: Any = json.loads((tmp_path / "coverage.json").read_text())
    at_99 = {one["n"]: one for one in found["task_mean"]}
    assert at_99[10]["bootstrap"] < 0.85 < at_99[10]["Price and Bonett"]
    assert "| Wilson | 10 |" in (tmp_path / "coverage.md").read_text()


def test_a_mechanism_that_plays_another_rollout_is_refused() -> None:
    key = PlannedRollout("policy", "red", 7, "go")
    one = {key: (True, np.zeros((3, 2)))}
    assert rollout_throughput.equal(one, {key: (True, np.full((3, 2), 1e-7))}) == pytest.approx(1e-7)
    for other in ((False, np.zeros((3, 2))), (True, np.zeros((2, 2)))):
        with pytest.raises(UserError, match="red, seed 7: this mechanism plays another rollout"):
            rollout_throughput.equal(one, {key: other})
    with pytest.raises(UserError, match=r"differ by 1\.0e-03"):
        rollout_throughput.equal(one, {key: (True, np.full((3, 2), 1e-3))})
