"""Random weights: a new draw for each update, the same on every machine and after every resume."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor

from tutti.config.run_config import load_config
from tutti.objectives.balancing.softmax import RandomWeightsBalancing, RandomWeightsBalancingConfig
from tutti.objectives.weight_schedule import schedule_of

NAMES = ("action", "align", "recon")


def build(seed: int = 0) -> RandomWeightsBalancing:
    return RandomWeightsBalancingConfig(seed=seed).build({name: schedule_of(1.0) for name in NAMES})


def factors(balancing: RandomWeightsBalancing, *names: str) -> list[float]:
    values: dict[str, Tensor] = {name: torch.ones(()) for name in names or NAMES}
    return [float(b) for b in balancing.factors(values).values()]


def test_weights_are_k_times_the_softmax_of_normals_of_seed_and_update() -> None:
    balancing = build(seed=5)
    for update in range(3):
        normals = numpy.random.default_rng([5, update]).standard_normal(3)
        powers = numpy.exp(normals)
        assert factors(balancing) == pytest.approx(list(3 * powers / powers.sum()))
        assert factors(balancing) == factors(balancing)  # validation asks too, and changes nothing
        balancing.after_step({})


def test_they_sum_to_the_number_of_computed_terms_and_are_torchjds_scaled() -> None:
    """torchjd's Random is softmax(n), which sums to 1; ours of the same n is K times that."""
    balancing = build()
    assert sum(factors(balancing)) == pytest.approx(3)
    assert sum(factors(balancing, "align", "recon")) == pytest.approx(2)
    torch.testing.assert_close(
        torch.tensor(factors(balancing), dtype=torch.float64), 3 * torch.softmax(balancing.draw, 0)
    )


def test_mean_weight_is_near_one_for_every_term() -> None:
    balancing, rows = build(), []
    for _ in range(4000):
        rows.append(factors(balancing))
        balancing.after_step({})
    assert numpy.mean(rows, axis=0).tolist() == pytest.approx([1.0, 1.0, 1.0], abs=0.04)


def test_draws_leave_the_global_random_numbers_alone_and_continue_from_a_state() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = build(seed=3)
    for _ in range(4):
        one.after_step({})
    other = build(seed=3)
    other.load_state_dict(one.state_dict())
    assert factors(other) == factors(one)
    one.after_step({})
    other.after_step({})
    assert factors(other) == factors(one) and torch.equal(torch.get_rng_state(), before)


def test_its_seed_is_the_runs_unless_given() -> None:
    def seed(*overrides: str) -> int:
        found = load_config(None, ["balancing.kind=rlw", *overrides]).balancing
        assert isinstance(found, RandomWeightsBalancingConfig)
        return found.seed

    assert (seed(), seed("seed=7"), seed("seed=7", "balancing.seed=2")) == (0, 7, 2)
