"""What a validation writes down, computed by hand: means over windows, of the weights that are served."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixtures.toy_training import BATCH, Data, make_batch, make_trainer
from tutti.distributed.world import ONE_PROCESS
from tutti.objectives.objective import Objective
from tutti.training.device import resolve_machine
from tutti.training.parallel.ddp import LossModule, Parallel
from tutti.training.records import read_records
from tutti.training.rng import seed_everything
from tutti.training.update import TermValues, read_scalars, to_host
from tutti.training.validation import validate
from tutti.types import Batch, Features, LossTerms, Observation, Tokens

MACHINE = resolve_machine("cpu", 1, "fp32")
SIZES = (4, 2, 1)


class Look(nn.Module):
    """Features of nothing, through a dropout, and a part that training keeps in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5)
        self.frozen.eval()

    def forward(self, observation: Observation) -> Features:
        readout = self.frozen(self.dropout(observation.state))
        nothing = Tokens(values=readout[:, None], mask=torch.ones(len(readout), 1, dtype=torch.bool))
        return Features(vision=nothing, language=nothing, readout=readout, fused_vision=nothing)


class Told(Objective):
    """`size`: the batch's number of windows; `random`: a draw; `state`: a mean. Notes what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[float, Any, bool, bool]] = []
        self.weight = nn.Parameter(torch.tensor(2.0))

    @property
    def names(self) -> tuple[str, ...]:
        return ("size", "random", "state")

    def forward(
        self,
        features: Features,
        batch: Batch,
        model: nn.Module,
        progress: float = 0.0,
        only: Collection[str] | None = None,
    ) -> LossTerms:
        self.asked.append((progress, only, self.training, torch.is_grad_enabled()))
        values: dict[str, Tensor] = {
            "size": torch.tensor(float(len(batch.window))),
            "random": torch.rand(()),
            "state": features.readout.mean() * self.weight,
        }
        values = {name: value for name, value in values.items() if only is None or name in only}
        rare = torch.tensor(float("nan") if len(batch.window) == 4 else 10.0 * len(batch.window))
        total = progress * sum(values.values(), torch.zeros(()))
        return LossTerms(
            values=values, lambdas=dict.fromkeys(values, torch.ones(())), total=total, metrics={"rare": rare}
        )


def batches() -> list[Batch]:
    return [make_batch(100 + number, size) for number, size in enumerate(SIZES)]


def run(**changes: Any) -> tuple[dict[str, float], Look, Told]:
    model, objective = Look(), Told()
    given: dict[str, Any] = {"progress": 0.25, "seed": 5, **changes}
    return (
        validate(Parallel(LossModule(model, objective), ONE_PROCESS), MACHINE, batches(), **given),
        model,
        objective,
    )


def test_values_are_means_over_the_windows_and_the_total_is_at_the_progress_that_is_given() -> None:
    """A metric is a mean over the windows that have it."""
    values, model, objective = run(progress=0.75)
    states = torch.cat([batch.observation.state for batch in batches()]).double()
    assert set(values) == {f"valid/{name}" for name in ("size", "random", "state", "total", "metric/rare")}
    assert values["valid/size"] == pytest.approx((4 * 4 + 2 * 2 + 1) / 7)
    assert values["valid/state"] == pytest.approx(2 * float(states.mean()), rel=1e-6)
    assert values["valid/metric/rare"] == pytest.approx((2 * 20 + 1 * 10) / 3)
    terms = values["valid/size"] + values["valid/random"] + values["valid/state"]
    assert values["valid/total"] == pytest.approx(0.75 * terms)
    # In evaluation mode without gradients; afterwards each module has its own mode.
    assert set(objective.asked) == {(0.75, None, False, False)}
    assert model.training and model.dropout.training and objective.training and not model.frozen.training


def test_only_the_named_terms_count_under_the_given_prefix() -> None:
    values, _, objective = run(only=("state",), prefix="valid_raw")
    assert set(values) == {"valid_raw/state", "valid_raw/total", "valid_raw/metric/rare"}
    assert {asked[1] for asked in objective.asked} == {("state",)}


def test_modes_are_restored_after_a_failure() -> None:
    model, objective = Look(), Told()

    def fail(*_: Any) -> Any:
        raise RuntimeError("stop")

    parallel = Parallel(LossModule(model, objective), ONE_PROCESS)
    parallel.evaluate_held_out = fail
    with pytest.raises(RuntimeError, match="stop"):
        validate(parallel, MACHINE, batches(), progress=0.5, seed=0)
    assert model.training and objective.training and not model.frozen.training


def test_batch_i_draws_from_the_seed_plus_i_and_training_s_own_draws_go_on() -> None:
    torch.manual_seed(77)
    following = torch.rand(3)
    torch.manual_seed(77)
    values, _, _ = run(seed=5)
    assert torch.equal(torch.rand(3), following)
    drawn = []
    for number in range(len(SIZES)):
        seed_everything(5 + number)
        drawn.append(float(torch.rand(())))
    expected = sum(size * value for size, value in zip(SIZES, drawn, strict=True)) / sum(SIZES)
    assert values["valid/random"] == pytest.approx(expected)
    assert len(set(drawn)) == len(SIZES)


def test_readings_are_fetched_in_their_own_order() -> None:
    def terms(shift: float) -> LossTerms:
        a, b = torch.tensor(1.0 + shift), torch.tensor(2.0 + shift)
        return LossTerms(
            values={"a": a, "b": b},
            lambdas={"a": 10 * a, "b": 10 * b},
            total=100 * (a + b),
            metrics={"m": -a, "n": torch.tensor(math.inf)},
        )

    expected = TermValues(
        values={"a": 1.0, "b": 2.0}, lambdas={"a": 10.0, "b": 20.0}, metrics={"m": -1.0}, total=300.0
    )
    scalars = [read_scalars(terms(shift)) for shift in (0.0, 1.0)]
    (first, second), more = to_host(scalars, torch.tensor(7.0), torch.tensor([8.0]))
    assert first == expected and second.values == {"a": 2.0, "b": 3.0} and second.total == 500.0
    assert more == [7.0, 8.0]


def by_hand(trainer: Any, data: Data, progress: float) -> dict[str, float]:
    """The means over the held-out windows with the weights that the modules have now."""
    trainer.model.eval()
    sums: dict[str, float] = {}
    windows = sum(len(batch.window) for batch in data.validation)
    with torch.no_grad():
        for batch in data.validation:
            terms = trainer.objective(trainer.model(batch.observation), batch, trainer.model, progress)
            for name, value in {**terms.values, "total": terms.total}.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(batch.window) / windows
    trainer.model.train()
    return sums


def test_the_served_weights_are_judged_and_those_in_training_beside_them(tmp_path: Path) -> None:
    data = Data()
    trainer = make_trainer(tmp_path, ema=0.9, validation={"raw": True, "every": 5}, steps=10)
    trainer.fit(data)
    assert {len(batch.window) for batch in data.validation} == {BATCH, 2}
    raw = by_hand(trainer, data, 1.0)
    trained = {
        name: {key: value.clone() for key, value in average.module.state_dict().items()}
        for name, average in trainer.averages.items()
    }
    for average in trainer.averages.values():
        average.module.load_state_dict(average.shadow)
    served = by_hand(trainer, data, 1.0)
    for name, average in trainer.averages.items():
        average.module.load_state_dict(trained[name])
    values = trainer.validate(data)  # pyright: ignore[reportArgumentType]
    for name in ("action", "recon", "total"):
        assert values[f"valid/{name}"] == pytest.approx(served[name], rel=1e-5)
        assert values[f"valid_raw/{name}"] == pytest.approx(raw[name], rel=1e-5)
    assert served["action"] != pytest.approx(raw["action"], rel=1e-4)
    (halfway,) = [r for r in read_records(tmp_path) if r["kind"] == "validation" and r["step"] == 5]
    # recon weighs 0.1 (1 - progress), and after 5 of 10 updates progress is 5 / 10.
    expected = halfway["valid/action"] + 0.1 * 0.5 * halfway["valid/recon"]
    assert halfway["valid/total"] == pytest.approx(expected, rel=1e-5)
