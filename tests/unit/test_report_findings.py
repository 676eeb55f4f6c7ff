"""Findings: each rule at its limits, on invented records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tutti.findings import Finding
from tutti.report.judges import judge_records
from tutti.report.records import Records
from tutti.report.sections.training import beyond

STEPS = list(range(50, 1050, 50))  # 20 looks


def judged(columns: Mapping[str, Any], config: dict[str, Any] | None = None) -> list[Finding]:
    """The findings in columns by name: a number is recorded at every look, a list from the first look on, and
    a pair is steps and values."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for name, value in columns.items():
        values = [float(v) for v in value] if isinstance(value, list) else [value] * len(STEPS)
        found[name] = value if isinstance(value, tuple) else (STEPS[: len(values)], values)
    return judge_records(Records(columns=found), config or {})


def shares(part: str, **terms: float) -> dict[str, float]:
    kinds = ("norm", "share", "update_share")
    return {f"diag/{what}/{term}/{part}": share for term, share in terms.items() for what in kinds}


def kinds(found: Sequence[Finding]) -> list[str]:
    return [finding.kind for finding in found]


def only(columns: Mapping[str, Any], config: dict[str, Any] | None = None) -> Finding:
    found = judged(columns, config)
    assert len(found) == 1, found
    return found[0]


SOUND = shares("vision", action=0.6, recon=0.2, align=0.2) | shares("fusion", action=0.8, recon=0.2)
FAINT = shares("fusion", action=0.98, recon=0.02)
ALIGN = {"metric/align/floor": 1.0, "metric/align/chance": 3.47}
SAMPLES = {"data/samples": [32.0 * step for step in STEPS]}
FALLING = [2.0 - 0.05 * n for n in range(20)]
HELD_OUT = [250, 500, 750, 1000]
LIMITS: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    (SOUND, []),
    ({"loss/action/raw": 0.3}, []),
    # the action may dominate, and so may a term where the action does not train
    (shares("vision", action=0.95, recon=0.05), []),
    (shares("vision", action=0.951, recon=0.049), ["idle"]),
    (shares("vision", action=0.3, recon=0.5, align=0.2), []),
    (shares("vision", action=0.29, recon=0.5, align=0.21), ["weak_action"]),
    (shares("vision", action=0.29, recon=0.51, align=0.2), ["dominates"]),
    # the language encoder may be another term's, and a gradient is not an update
    (SOUND | shares("language", action=0.01, align=0.99), []),
    (SOUND | {"diag/share/action/fusion": 0.02, "diag/share/recon/fusion": 0.98}, []),
    (
        shares("language", align=1.0, action=0.0) | shares("vision", action=0.5, align=0.5),
        ["no_action_gradient"],
    ),
    # a part frozen at the end is no fault
    (
        shares("fusion", action=0.6, recon=0.4)
        | dict.fromkeys(shares("vision", action=0.0, recon=0.0), [0.5] * 10),
        [],
    ),
    # a conflict needs most looks, a clear mean, enough of them, and terms that have a weight
    (SOUND | {"diag/cosine/action~recon/fusion": [-0.5] * 16 + [0.05] * 4}, ["conflict"]),
    (SOUND | {"diag/cosine/action~recon/fusion": [-0.5] * 15 + [0.05] * 5}, []),
    (SOUND | {"diag/cosine/action~recon/fusion": [-0.1] * 16 + [0.05] * 4}, []),
    (SOUND | {"diag/cosine/action~recon/fusion": [-0.5] * 8 + [0.05]}, []),
    (FAINT | {"diag/cosine/action~recon/fusion": -0.9}, ["idle"]),
    (SOUND | {"diag/dead/vision": 0.29}, []),
    # of few rows no rank says anything
    (SOUND | {"diag/rank/readout": 1.6, "diag/rank_limit/readout": 16.0}, []),
    (SOUND | {"diag/rank/readout": 1.0, "diag/rank_limit/readout": 1.0}, []),
    (SOUND | {"diag/rank/readout": 1.3, "diag/rank_limit/readout": 4.0}, []),
    (SOUND | {"diag/update_ratio/fusion": 1e-3}, []),
    (SOUND | {"diag/update_ratio/fusion": 0.0}, []),
    (SOUND | SAMPLES | {"diag/noise_scale": 300.0}, []),
    (SOUND | SAMPLES | {"diag/noise_scale": 4.0}, []),
    (SOUND | {"diag/spikes": 0.0}, []),
    ({"optim/clip_share": [1.0] * 4 + [0.0] * 16}, []),
    ({"optim/clip_share": [1.0] * 5 + [0.1] * 15}, ["often_clipped"]),
    ({"optim/clip_share": [1.0] * 5}, []),  # too short to say
    # overfitting is a held-out rise against a training fall
    ({"loss/align/raw": FALLING, "valid/align": (HELD_OUT, [1.7, 1.6, 1.9, 2.4])}, ["overfit"]),
    ({"loss/align/raw": FALLING[::-1], "valid/align": (HELD_OUT, [1.7, 1.6, 1.9, 2.4])}, []),
    ({"loss/align/raw": FALLING, "valid/align": (HELD_OUT, [1.9, 1.7, 1.6, 1.65])}, []),
    ({"loss/align/raw": FALLING, "valid/align": (HELD_OUT[:2], [1.0, 2.0])}, []),
    (ALIGN | {"loss/align/raw": 3.46}, ["at_chance"]),
    (ALIGN | {"loss/align/raw": 1.02}, ["at_floor"]),
    (ALIGN | {"loss/align/raw": 2.02, "metric/align/reachable": 2.0}, ["at_floor"]),
    (ALIGN | {"loss/align/raw": 1.5, "metric/align/reachable": 2.0}, ["by_heart"]),
    (ALIGN | {"loss/align/raw": 2.0}, []),
    (ALIGN | {"loss/align/raw": 3.3}, []),
    # a baseline must stand above in no quarter; without a record in each quarter nothing is said
    ({"loss/recon/raw": 0.7, "metric/recon/copy_baseline": 0.6}, ["above_baseline"]),
    ({"loss/recon/raw": [0.7] * 15 + [0.5] * 5, "metric/recon/copy_baseline": 0.6}, []),
    ({"loss/recon/raw": [0.5] * 5 + [0.7] * 15, "metric/recon/copy_baseline": 0.6}, []),
    ({"loss/recon/raw": [0.7] * 3, "metric/recon/copy_baseline": 0.6}, []),
    # held-out values are compared with each other, not with those of the training
    (
        {
            "loss/recon/raw": 0.5,
            "metric/recon/copy_baseline": 0.6,
            "valid/recon": (HELD_OUT, [0.7] * 4),
            "valid/metric/recon/copy_baseline": (HELD_OUT, [0.6] * 4),
        },
        ["above_baseline"],
    ),
    # chance is compared with the cross-entropy where a term reports one
    ({"loss/text/raw": 9.0, "metric/text/cross_entropy": 1.0, "metric/text/chance": 3.0}, []),
]


@pytest.mark.parametrize(("columns", "expected"), LIMITS)
def test_each_rule_at_its_limits(columns: dict[str, Any], expected: list[str]) -> None:
    assert kinds(judged(columns)) == expected


def test_domination_names_term_part_share_and_the_weight_that_mends_it() -> None:
    found = only(shares("vision", action=0.05, recon=0.95), {"objective": {"recon": {"weight": 0.1}}})
    assert (found.kind, found.severity, found.term, found.part) == ("dominates", "warning", "recon", "vision")
    assert found.sentence.startswith("recon makes 95 % of the update of the vision encoder")
    assert found.number == pytest.approx(0.95)
    # with w' the norms are 0.05 and 0.95 w' / 0.1, a share of 0.2: w' = 0.1 x 0.0125 / 0.95 = 0.001316
    assert "objective.recon.weight=0.0013" in found.cure
    weight = {"start": 5.0, "end": 0.5, "schedule": "cosine"}
    found = only(shares("fusion", action=0.25, state=0.75), {"objective": {"state": {"weight": weight}}})
    assert found.severity == "hint"
    # 0.25 x 0.25 / 0.75 = 1 / 12
    assert "weight (5 to 0.5)" in found.cure
    assert "`objective.state.weight.start=0.42` and `end=0.042`" in found.cure


def test_a_term_above_its_baseline_is_named_with_both_numbers() -> None:
    falling = [0.9] * 15 + [0.75] * 5
    found = only({"loss/state/raw": falling, "metric/state/hold_baseline": 0.6})
    assert (found.kind, found.severity, found.term) == ("above_baseline", "warning", "state")
    assert found.sentence.startswith(
        "state never gets below holding still: at best 0.75, against 0.6, the loss"
    )


def test_a_chart_says_how_far_a_term_is_below_copying_at_each_offset() -> None:
    columns = {
        "loss/recon/raw": 0.48,
        "metric/recon/copy_baseline": 0.6,
        **{f"metric/recon/value/{k}": value for k, value in ((2, 0.63), (10, 0.3))},
        **{f"metric/recon/copy_baseline/{k}": 0.6 for k in (10, 2)},
    }
    records = Records(columns={name: (STEPS, [value] * len(STEPS)) for name, value in columns.items()})
    assert beyond(records, "recon") == ", 20 % below copying (+2 5 % above, +10 50 % below)"
    assert beyond(records, "action") == ""


def test_two_loud_terms_do_not_hide_each_other() -> None:
    config = {"objective": {"recon": {"weight": 10.0}, "state": {"weight": 5.0}}}
    found = judged(shares("vision", action=0.002, recon=0.5, state=0.49), config)
    assert [(one.kind, one.severity, one.term) for one in found] == [
        ("dominates", "warning", "recon"),
        ("dominates", "warning", "state"),
    ]
    assert "recon makes 50 % of the update of the vision encoder, action 0.20 %" in found[0].sentence
    # w' = 10 x 0.25 x 0.002 / 0.5 = 0.01: 0.0005 beside the action's 0.002 is a fifth of the two
    assert "objective.recon.weight=0.01" in found[0].cure and "what it and action supply" in found[0].cure
    assert kinds(judged(shares("vision", action=0.1, recon=0.46, state=0.44), config)) == ["weak_action"]


def test_only_the_second_half_counts_for_domination_because_a_schedule_may_let_a_term_go_first() -> None:
    def run(first: float, second: float) -> dict[str, list[float]]:
        recon = {name: [first] * 10 + [second] * 10 for name in shares("vision", recon=0.0)}
        return recon | {name: [1 - first] * 10 + [1 - second] * 10 for name in shares("vision", action=0.0)}

    found = only(run(0.3, 0.95))
    assert (
        "95 % of the update of the vision encoder, action 5 % (medians over the second half" in found.sentence
    )
    assert judged(run(0.69, 0.3)) == []
    # a window of updates in the first half alone speaks for the run
    one = {
        "diag/update_share/recon/vision": ([100], [0.6]),
        "diag/update_share/action/vision": ([100], [0.4]),
    }
    found = only(shares("vision", action=0.4, recon=0.6) | one)
    assert found.kind == "dominates" and "half" not in found.sentence


def test_idle_term_is_named_with_the_factor_that_would_help() -> None:
    extra = shares("vision", extra=0.004) | shares("fusion", extra=0.002)
    found = only(SOUND | extra)
    assert (found.kind, found.severity, found.term) == ("idle", "hint", "extra")
    assert "at most 0.40 %" in found.sentence
    assert "Raise `objective.extra.weight` (times 25 would be 10 %)" in found.cure
    found = only(SOUND | extra, {"objective": {"extra": {"share": 0.01}}})
    assert "`objective.extra.share`" in found.cure
    # what comes to teach later is not idle
    assert judged(SOUND | {name: [0.004] * 10 + [0.1] * 10 for name in shares("vision", extra=0.0)}) == []


def test_an_action_that_makes_little_of_the_update_is_told_with_the_others() -> None:
    found = only(shares("fusion", action=0.2, recon=0.45, state=0.35))
    assert (found.kind, found.severity, found.part) == ("weak_action", "hint", "fusion")
    assert found.sentence == (
        "action makes only 20 % of the update of the fusion over the run (recon 45 % and state 35 %)."
    )
    assert "lower the weight of recon: `objective.recon.weight`" in found.cure


def test_part_without_any_gradient_and_part_without_the_actions() -> None:
    found = only(SOUND | shares("vision", action=0.0, recon=0.0, align=0.0))
    assert (found.kind, found.severity, found.part) == ("unreached", "fault", "vision")
    assert found.sentence == "The vision encoder gets no gradient from any term."
    found = only(shares("vision", action=0.0, recon=0.5, align=0.5))
    assert (found.kind, found.severity) == ("no_action_gradient", "fault")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"objective": {"action": {"stop_gradient": ["fused"]}}}, "stop_gradient is fused"),
        ({"backward": {"kind": "knowledge_insulation"}}, "backward.kind is knowledge_insulation"),
        ({"backward": {"kind": "masked", "may_train": {"action": ["fusion"]}}}, "backward.kind is masked"),
    ],
)
def test_what_the_config_asks_for_is_a_hint_only(config: dict[str, Any], said: str) -> None:
    found = only(shares("vision", action=0.0, recon=0.5, align=0.5), config)
    assert found.severity == "hint" and said in found.sentence


def test_faults_of_features_and_conflicts_are_told_with_their_numbers() -> None:
    found = only(SOUND | {"diag/cosine/action~recon/fusion": [-0.5] * 16 + [0.05] * 4})
    assert (found.term, found.part, found.severity) == ("recon", "fusion", "warning")
    assert "action and recon conflict in the fusion" in found.sentence
    assert "below 0 in 80 % of 20 diagnostic steps, on average -0.39" in found.sentence
    dead = only(SOUND | {"diag/dead/vision": 0.63})
    assert (dead.severity, dead.part, dead.number) == ("fault", "vision", pytest.approx(0.63))
    assert dead.sentence.startswith("63 % of the units of the vision tokens are dead")
    flat = only(SOUND | {"diag/rank/readout": 1.3, "diag/rank_limit/readout": 16.0})
    assert flat.kind == "collapsed"
    assert flat.sentence.startswith("The effective rank of the readout is 1.3 of 16: it has collapsed")


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("diag/update_ratio/fusion", 9e-6, "The fusion hardly moves"),
        ("diag/update_ratio/fusion", 0.11, "The fusion jumps"),
        ("diag/noise_scale", 400.0, "the batch 32: single steps are mostly noise"),
        ("diag/noise_scale", 3.0, "the batch 32: the batch averages out"),
    ],
)
def test_update_ratio_and_noise_scale_outside_their_bounds(column: str, value: float, said: str) -> None:
    assert said in only(SOUND | SAMPLES | {column: value}).sentence


def test_spikes_are_a_hint_and_many_are_a_warning() -> None:
    few = only(SOUND | {"diag/spikes": [0] * 10 + [1] * 10, "diag/spike/align": [7.0]})
    assert (few.kind, few.severity) == ("loss_spikes", "hint")
    assert few.sentence == "1 loss spike in 1,000 steps (last: align at step 50)."
    assert only(SOUND | {"diag/spikes": 3.0}).severity == "warning"


def test_frequent_clipping_and_overfitting_name_their_numbers() -> None:
    columns = {"optim/clip_share": 0.99, "optim/grad_norm": 6.5}
    found = only(columns, {"training": {"gradients": {"clip_norm": 1.0}}})
    assert found.sentence == (
        "99 % of the steps are clipped (mean gradient norm 6.5, clip_norm 1): the threshold rescales usual "
        "gradients, it does not guard."
    )
    found = only({"loss/align/raw": FALLING, "valid/align": (HELD_OUT, [1.7, 1.6, 1.9, 2.4])})
    assert (found.term, found.number) == ("align", pytest.approx(0.5))
    assert "rose by 50 % since step 500 (1.6 to 2.4)" in found.sentence


def test_grave_findings_come_first_and_foreign_configs_do_no_harm() -> None:
    columns = shares("vision", action=0.25, state=0.75)
    columns |= {"diag/dead/readout": 0.5, "diag/update_ratio/fusion": 1.0}
    for config in ({}, {"objective": None}, {"objective": {"state": 3, "action": []}}, {"training": []}):
        assert [f.severity for f in judged(columns, config)] == ["fault", "warning", "hint"]
