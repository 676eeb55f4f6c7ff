"""Shares: b from the first batches, then medians over a window, said in words, refused where it cannot be."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch

from tutti.config.run_config import load_config
from tutti.objectives.balancing.shares import SharesBalancing, SharesBalancingConfig
from tutti.objectives.objective import PhaseSpan, TermSize
from tutti.objectives.weight_schedule import Weight, WeightSchedule, schedule_of
from tutti.types import UserError

NAMES = ("align", "action", "recon")
WARMUP = 2


def spans(*ends: int, terms: tuple[str, ...] = NAMES, restarts: bool = False) -> list[PhaseSpan]:
    return [
        PhaseSpan(start, end, restarts or start == 0, terms)
        for start, end in zip((0, *ends[:-1]), ends, strict=True)
    ]


def build(phases: list[PhaseSpan] | None = None, **options: Any) -> SharesBalancing:
    """align and recon with shares 0.1 and 0.2, for a run of 100 updates."""
    schedules = {"align": schedule_of(0.1), "action": schedule_of(1.0), "recon": schedule_of(0.2)}
    config = SharesBalancingConfig(**{"steps": 4, **options})
    found = config.build(schedules, ("align", "recon"))
    found.before_run(phases or spans(100), WARMUP)
    return found


def size(own: float, primary: float = 0.0, value: float = 1.0, anywhere: float | None = None) -> TermSize:
    return TermSize(own=own, primary=primary, anywhere=own if anywhere is None else anywhere, value=value)


def lambdas(balancing: SharesBalancing, progress: float = 0.0) -> dict[str, float]:
    given = {name: torch.ones((), dtype=torch.float64) for name in balancing.names}
    return {name: value.item() for name, value in balancing(given, progress).items()}


FIRST = {"action": size(2.0, 2.0), "align": size(4.0, 1.0), "recon": size(0.5, 2.0)}
"""Gradients of a first batch: b is 1/4 for align, over what it shares with action, and 4 for recon."""


def test_the_first_batch_gives_lambdas_over_what_each_pair_moves() -> None:
    balancing = build()
    assert lambdas(balancing) == {"align": 0.1, "action": 1.0, "recon": 0.2}
    assert balancing.unmeasured(0) == ("action", "align", "recon")
    balancing.observe_gradients(FIRST)
    assert balancing.unmeasured(0) == ()
    assert lambdas(balancing) == pytest.approx({"align": 0.1 / 4, "action": 1.0, "recon": 0.2 * 4})


def test_the_window_freezes_the_ratio_of_medians_over_its_second_half() -> None:
    balancing = build()
    balancing.observe_gradients(FIRST)
    before = lambdas(balancing)
    assert [step for step in range(10) if balancing.window(step)] == [2, 3, 4, 5]
    rows = {3: (9.0, 1.0), 4: (8.0, 2.0), 5: (2.0, 6.0)}
    for step in range(10):
        balancing.before_step(step)
        assert (lambdas(balancing) == before) == (step < 6)
        if step in rows:
            own, primary = rows[step]
            sizes = {"action": size(3.0, 3.0), "align": size(own, primary), "recon": size(1.0, 3.0)}
            balancing.observe_updates(step - 2, sizes)
    # medians: align 8, action beside it 2, recon 1 and 3
    assert lambdas(balancing) == pytest.approx({"align": 0.1 * 2 / 8, "action": 1.0, "recon": 0.2 * 3})


def test_two_rows_have_their_middle_as_median_and_an_update_that_is_left_out_does_not_count() -> None:
    balancing = build()
    for row, own in ((2, 1.0), (3, 3.0)):
        balancing.observe_updates(row, {"action": size(1.0, 1.0), "align": size(own, 1.0)})
    balancing.before_step(6)
    assert lambdas(balancing)["align"] == pytest.approx(0.1 / 2)
    other = build()
    other.observe_updates(3, {"action": size(1.0, 1.0), "align": size(3.0, 1.0)})
    other.before_step(6)
    assert lambdas(other)["align"] == pytest.approx(0.1 / 3)


@pytest.mark.parametrize(
    ("options", "phases", "windows"),
    [
        ({}, spans(100), [range(2, 6)]),
        ({"start": 10}, spans(100), [range(10, 14)]),
        ({"steps": 50}, spans(20), [range(2, 7)]),  # a quarter of what is left
        ({}, spans(40, 100), [range(2, 6), range(40, 44)]),
        ({"again": "never"}, spans(40, 100), [range(2, 6)]),
        ({"again": 40}, spans(100), [range(2, 6), range(42, 46), range(82, 86)]),
        ({}, spans(40, 100, restarts=True), [range(2, 6), range(42, 46)]),
        ({}, spans(1, 100), [range(2, 6)]),  # the first phase ends within the warm-up
        ({}, spans(100, terms=("align", "recon")), []),
        ({}, spans(100, terms=("action",)), []),
    ],
)
def test_windows(options: dict[str, Any], phases: list[PhaseSpan], windows: list[range]) -> None:
    assert list(build(phases, **options).windows) == windows


def test_a_share_follows_its_schedule_and_the_weight_of_action() -> None:
    falling = WeightSchedule(start=0.4, end=0.0, schedule="linear")
    schedules = {"action": schedule_of(0.5), "recon": falling}
    balancing = SharesBalancingConfig().build(schedules, ("recon",))
    balancing.before_run(spans(100, terms=("action", "recon")), WARMUP)
    balancing.observe_gradients({"action": size(2.0, 2.0), "recon": size(0.5, 2.0)})
    assert lambdas(balancing, 0.5) == pytest.approx({"action": 0.5, "recon": 0.2 * 0.5 * 4})
    assert not balancing.is_active("recon", 1.0)


def test_weights_beside_shares_are_lambdas_to_the_last_bit() -> None:
    schedules = {"action": schedule_of(1.0), "align": schedule_of(0.1), "recon": schedule_of(0.2)}
    balancing = SharesBalancingConfig().build(schedules, ("recon",))
    balancing.before_run(spans(100), WARMUP)
    assert balancing.unmeasured(0) == ("action", "recon") and balancing.observes == ("action", "recon")
    balancing.observe_gradients({"action": size(2.0, 2.0), "recon": size(0.5, 2.0)})
    assert lambdas(balancing)["align"] == 0.1
    plain = SharesBalancingConfig().build(schedules)
    plain.before_run(spans(100), WARMUP)
    assert (
        plain.state_dict() == {}
        and plain.windows == ()
        and plain.unmeasured(0) == ()
        and lambdas(plain)["recon"] == 0.2
    )


def test_a_term_without_labels_in_the_first_batch_is_measured_on_a_later_one() -> None:
    balancing = build()
    balancing.observe_gradients({**FIRST, "align": size(0.0, 0.0, value=0.0)})
    assert balancing.unmeasured(1) == ("action", "align")
    balancing.observe_gradients({"action": size(0.0, value=0.0), "align": size(1.0, 0.0)})  # no actions in it
    assert balancing.unmeasured(1) == ("action", "align")
    balancing.observe_gradients({"action": size(2.0, 2.0), "align": size(1.0, 2.0)})
    assert balancing.unmeasured(1) == () and lambdas(balancing)["align"] == pytest.approx(0.2)
    assert build().unmeasured(WARMUP) == ()  # the window does it by then


def test_what_cannot_be_measured_keeps_its_factor_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    balancing = build()
    balancing.observe_gradients({**FIRST, "recon": size(0.0, 0.0, anywhere=3.0)})  # only its own head
    balancing.observe_updates(3, {"action": size(2.0, 2.0), "recon": size(0.0, 0.0, anywhere=1.0)})
    balancing.before_step(6)
    assert lambdas(balancing) == {"align": 0.1 / 4, "action": 1.0, "recon": 0.2}
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [("'recon' moves nothing" in line, "'align' was not active" in line) for line in said] == [
        (True, False),
        (False, True),
        (False, False),
    ]
    assert "'recon' moved nothing that action moves" in said[2] and "times 1." in said[2]
    assert "share times 0.25" in said[1] and "objective.align.weight" in said[1]


def test_a_term_of_a_later_phase_is_no_warning_in_an_earlier_one(caplog: pytest.LogCaptureFixture) -> None:
    phases = [*spans(40, terms=("action", "align")), *spans(40, 100)[1:]]
    balancing = build(phases)
    balancing.observe_gradients(FIRST)
    for start in (2, 40):
        balancing.before_step(start)
        balancing.observe_updates(3, {"action": size(1.0, 1.0), "align": size(2.0, 1.0)})
        balancing.before_step(start + 4)
        assert ("'recon' was not active" in caplog.text) == (start == 40)


def test_without_a_gradient_of_action_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    balancing = build()
    with pytest.raises(UserError, match=r"'action' had no gradient on the batches of the first update"):
        balancing.observe_gradients({**FIRST, "action": size(0.0)})
    for row in (2, 3):
        balancing.observe_updates(row, {"action": size(0.0), "align": size(1.0)})
    with pytest.raises(UserError, match=r"no gradient in the updates .*\n.*\n  cure:"):
        balancing.before_step(6)
    other = build()
    other.before_step(6)  # all updates of the window were left out
    assert "no update of the window was made" in caplog.text
    for shares in (("action",), ("recon",)):
        with pytest.raises(UserError, match="relative to 'action', which must be a term"):
            SharesBalancingConfig().build({"recon": schedule_of(1.0)}, shares)


def test_a_first_batch_that_is_not_finite_settles_nothing() -> None:
    balancing = build()
    balancing.observe_gradients({**FIRST, "align": size(math.nan, 1.0)})
    assert balancing.unmeasured(0) == ("action", "align", "recon")


def test_the_table_says_what_was_found_and_which_weights_it_stands_for() -> None:
    balancing = build()
    assert balancing.take_news(0.0) is None
    balancing.observe_gradients(FIRST)
    news = balancing.take_news(0.0)
    assert news is not None and balancing.take_news(0.0) is None
    assert news.table.splitlines()[1:] == [
        "  term   share   size before  lambda",
        "  align  0.1     0.4          0.025",
        "  recon  0.2     0.05         0.8",
        "  the same without a measurement: objective.align.weight=0.025 objective.recon.weight=0.8",
    ]
    assert news.values == pytest.approx(
        {
            "calibration/updates": 0.0,
            **{"calibration/size/align": 0.4, "calibration/lambda/align": 0.025},
            **{"calibration/size/recon": 0.05, "calibration/lambda/recon": 0.8},
        }
    )
    balancing.observe_updates(3, {"action": size(1.0, 1.0), "align": size(8.0, 1.0)})
    balancing.before_step(6)
    news = balancing.take_news(0.0)
    assert news is not None and "1 update" in news.table and "recon" not in news.table
    # With lambda 0.025 it was twice as large as asked for.
    assert news.values["calibration/size/align"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    "share",
    [
        0.2,
        WeightSchedule(start=0.2, end=0.1, schedule="linear", start_at=0.5),
        WeightSchedule(start=0.2, schedule="constant", warmup=0.1),
    ],
)
def test_the_weights_that_are_printed_can_be_given(share: Weight) -> None:
    schedules = {"action": schedule_of(1.0), "recon": schedule_of(share)}
    balancing = SharesBalancingConfig().build(schedules, ("recon",))
    balancing.before_run(spans(100, terms=("action", "recon")), WARMUP)
    balancing.observe_gradients({"action": size(2.0, 2.0), "recon": size(0.5, 2.0)})
    news = balancing.take_news(0.0)
    assert news is not None
    given = news.table.rpartition(": objective.recon")[2].replace("'", "")
    config = load_config(None, [f"objective.recon{given}"])
    for progress in (0.0, 0.05, 0.7, 1.0):
        expected = lambdas(balancing, progress)["recon"]
        assert config.objective.schedules()["recon"].at(progress) == pytest.approx(expected, rel=1e-3)


def test_a_window_that_is_rolled_back_is_measured_again() -> None:
    balancing = build()
    before = {key: value.clone() for key, value in balancing.state_dict().items()}
    for found in (1.0, 4.0):
        balancing.load_state_dict(before)
        for step in range(2, 7):
            balancing.before_step(step)
            if step < 6:
                balancing.observe_updates(step - 2, {"action": size(1.0, 1.0), "align": size(found, 1.0)})
        assert lambdas(balancing)["align"] == pytest.approx(0.1 / found)
