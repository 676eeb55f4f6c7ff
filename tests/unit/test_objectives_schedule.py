"""Lambda schedules: exact ends, the published formulas, refusals."""

from __future__ import annotations

from math import cos, pi

import pytest
from pydantic import TypeAdapter

from tutti.objectives.weight_schedule import Weight, WeightSchedule, schedule_of


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_ends_are_exact_and_held(kind: str) -> None:
    schedule = WeightSchedule.model_validate(
        {"start": 0.3, "end": 0.1, "schedule": kind, "start_at": 0.2, "end_at": 0.7}
    )
    assert [schedule.at(p) for p in (-1.0, 0.0, 0.2)] == [0.3, 0.3, 0.3]
    assert [schedule.at(p) for p in (0.7, 0.9, 1.0, 2.0)] == [0.1, 0.1, 0.1, 0.1]
    assert schedule.at(0.45) == pytest.approx(0.2)


def test_formulas() -> None:
    cosine = WeightSchedule(start=0.1, end=0.02, schedule="cosine")
    linear = WeightSchedule(start=0.1, end=0.02, schedule="linear")
    for t in (0.1, 0.25, 0.8):
        assert cosine.at(t) == pytest.approx(0.02 + 0.08 * (1 + cos(pi * t)) / 2)
        assert linear.at(t) == pytest.approx(0.1 - 0.08 * t)


def test_start_below_end_is_a_warm_up() -> None:
    rising = WeightSchedule(start=0.0, end=0.4, schedule="linear", end_at=0.5)
    assert [rising.at(p) for p in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.2, 0.4, 0.4]


def test_warmup_rises_before_the_schedule_falls() -> None:
    schedule = WeightSchedule(start=0.4, end=0.0, schedule="linear", start_at=0.5, warmup=0.25)
    assert [schedule.at(p) for p in (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)] == [0.0, 0.2, 0.4, 0.4, 0.2, 0.0]
    steady = WeightSchedule(start=0.4, schedule="constant", warmup=0.25)
    assert [steady.at(p) for p in (0.0, 0.125, 0.25, 1.0)] == [0.0, 0.2, 0.4, 0.4]
    both = WeightSchedule(start=0.4, end=0.0, schedule="cosine", warmup=0.5)
    plain = WeightSchedule(start=0.4, end=0.0, schedule="cosine")
    assert both.at(0.25) == pytest.approx(0.5 * plain.at(0.25)) and both.at(0.75) == plain.at(0.75)


def test_a_number_is_constant() -> None:
    weight = TypeAdapter(Weight).validate_python(0.1)
    assert [schedule_of(weight).at(p) for p in (0.0, 0.5, 1.0)] == [0.1, 0.1, 0.1]
    given = TypeAdapter(Weight).validate_python({"start": 0.1, "schedule": "cosine"})
    assert schedule_of(given).at(1.0) == 0


def test_zero_is_known_in_advance() -> None:
    assert schedule_of(0.0).is_zero
    assert not WeightSchedule(start=0.0, end=0.1, schedule="linear").is_zero
    assert not schedule_of(0.1).is_zero


@pytest.mark.parametrize(
    "bad",
    [
        {"start": -0.1},
        {"start": 0.1, "start_at": 0.5, "end_at": 0.5},
        {"start": 0.1, "end": 0.2, "schedule": "constant"},
        {"start": float("nan")},
        {"start": 0.1, "schedule": "cosin"},
        {"start": 0.1, "stop": 0.2},
        {"start": 0.1, "end_at": 0.3, "warmup": 0.3},
    ],
)
def test_what_makes_no_sense_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"start|start_at|constant|cosin|stop"):
        TypeAdapter(Weight).validate_python(bad)
