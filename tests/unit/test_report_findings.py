"""Findings: each rule at its limits, on invented records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tutti.findings import AUX_SHARE_TARGET, Finding
from tutti.report.findings import judge_records
from tutti.report.records import Records

STEPS = list(range(50, 1050, 50))  # 20 looks


def records(**columns: Any) -> Records:
    """Columns by name: a number is recorded at every look, a list from the first look on."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for name, value in columns.items():
        values = [float(v) for v in value] if isinstance(value, list) else [float(value)] * len(STEPS)
        found[name] = (STEPS[: len(values)], values)
    return Records(columns=found)


def shares(part: str, **terms: float) -> dict[str, float]:
    return {
        f"diag/{what}/{term}/{part}": share for term, share in terms.items() for what in ("norm", "share")
    }


def kinds(found: Sequence[Finding]) -> list[str]:
    return [finding.kind for finding in found]


def only(columns: Mapping[str, Any], config: dict[str, Any] | None = None) -> Finding:
    found = judge_records(records(**columns), config or {})
    assert len(found) == 1, found
    return found[0]


SOUND = shares("vision", action=0.6, recon=0.2, align=0.2) | shares("fusion", action=0.8, recon=0.2)


def test_sound_records_and_old_records_have_no_finding() -> None:
    assert judge_records(records(**SOUND), {}) == []
    assert judge_records(records(**{"loss/action/raw": 0.3}), {}) == []
    assert judge_records(records(), {}) == []


def test_domination_names_term_part_share_and_the_weight_that_mends_it() -> None:
    found = only(shares("vision", action=0.05, recon=0.95), {"objective": {"recon": {"weight": 0.1}}})
    assert (found.kind, found.severity, found.term, found.part) == ("dominates", "warning", "recon", "vision")
    assert found.sentence.startswith("recon supplies 95 % of the gradient of the vision encoder")
    assert found.number == pytest.approx(0.95)
    # with w' the norms are 0.05 and 0.95 w' / 0.1, a share of 0.2: w' = 0.1 x 0.0125 / 0.95 = 0.001316
    assert "objective.recon.weight=0.0013" in found.cure


def test_suggested_weight_gives_the_wanted_share() -> None:
    for share in (0.7, 0.85, 0.99):
        factor = AUX_SHARE_TARGET / (1 - AUX_SHARE_TARGET) * (1 - share) / share
        assert factor * share / (factor * share + 1 - share) == pytest.approx(0.2)


def test_strong_term_is_a_hint_and_its_schedule_is_scaled_at_both_ends() -> None:
    weight = {"start": 5.0, "end": 0.5, "schedule": "cosine"}
    found = only(shares("fusion", action=0.25, state=0.75), {"objective": {"state": {"weight": weight}}})
    assert found.severity == "hint"
    # 0.25 x 0.25 / 0.75 = 1 / 12
    assert "weight (5 to 0.5)" in found.cure
    assert "`objective.state.weight.start=0.42` and `end=0.042`" in found.cure


def test_two_loud_terms_do_not_hide_each_other() -> None:
    config = {"objective": {"recon": {"weight": 10.0}, "state": {"weight": 5.0}}}
    found = judge_records(records(**shares("vision", action=0.002, recon=0.5, state=0.49)), config)
    assert [(one.kind, one.severity, one.term) for one in found] == [
        ("dominates", "warning", "recon"),
        ("dominates", "warning", "state"),
    ]
    assert "recon supplies 50 % of the gradient of the vision encoder, action 0.20 %" in found[0].sentence
    # w' = 10 x 0.25 x 0.002 / 0.5 = 0.01: 0.0005 beside the action's 0.002 is a fifth of the two
    assert "objective.recon.weight=0.01" in found[0].cure and "what it and action supply" in found[0].cure
    assert judge_records(records(**shares("vision", action=0.02, recon=0.5, state=0.48)), config) == []


def test_the_action_may_dominate_and_so_may_a_term_where_the_action_does_not_train() -> None:
    assert judge_records(records(**shares("vision", action=0.97, recon=0.03)), {}) == []
    alone = shares("language", align=1.0, action=0.0) | shares("vision", action=0.5, align=0.5)
    assert kinds(judge_records(records(**alone), {})) == ["no_action_gradient"]


def test_only_the_second_half_counts_for_domination_because_a_schedule_may_let_a_term_go_first() -> None:
    def run(first: float, second: float) -> dict[str, list[float]]:
        recon = {name: [first] * 10 + [second] * 10 for name in shares("vision", recon=0.0)}
        return recon | {name: [1 - first] * 10 + [1 - second] * 10 for name in shares("vision", action=0.0)}

    found = only(run(0.3, 0.95))
    assert "95 % of the gradient of the vision encoder (medians over the second half" in found.sentence
    assert judge_records(records(**run(0.95, 0.3)), {}) == []


def test_idle_term_is_named_with_the_factor_that_would_help() -> None:
    found = only(SOUND | shares("vision", extra=0.004) | shares("fusion", extra=0.002))
    assert (found.kind, found.severity, found.term) == ("idle", "hint", "extra")
    assert "at most 0.40 %" in found.sentence and "times 25" in found.cure


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


def test_a_part_frozen_at_the_end_is_no_fault() -> None:
    frozen = {name: [0.5] * 10 for name in shares("vision", action=0.0, recon=0.0)}
    assert judge_records(records(**shares("fusion", action=0.6, recon=0.4), **frozen), {}) == []


@pytest.mark.parametrize(
    ("negative", "size", "count", "expected"),
    [(16, -0.5, 20, ["conflict"]), (15, -0.5, 20, []), (16, -0.1, 20, []), (8, -0.5, 9, [])],
)
def test_conflict_needs_most_looks_a_clear_mean_and_enough_of_them(
    negative: int, size: float, count: int, expected: list[str]
) -> None:
    cosines = [size] * negative + [0.05] * (count - negative)
    found = judge_records(records(**SOUND, **{"diag/cosine/action~recon/fusion": cosines}), {})
    assert kinds(found) == expected
    if expected:
        assert (found[0].term, found[0].part, found[0].severity) == ("recon", "fusion", "warning")
        assert "action and recon conflict in the fusion" in found[0].sentence
        assert "below 0 in 80 % of 20 diagnostic steps, on average -0.39" in found[0].sentence


def test_conflict_of_a_term_without_weight_is_none() -> None:
    faint = shares("fusion", action=0.98, recon=0.02)
    assert judge_records(records(**faint, **{"diag/cosine/action~recon/fusion": -0.9}), {}) == []


def test_dead_units_and_collapse_are_faults_with_their_number() -> None:
    dead = only(SOUND | {"diag/dead/vision": 0.63})
    assert (dead.severity, dead.part, dead.number) == ("fault", "vision", pytest.approx(0.63))
    assert dead.sentence.startswith("63 % of the units of the vision tokens are dead")
    assert judge_records(records(**SOUND, **{"diag/dead/vision": 0.29}), {}) == []
    flat = only(SOUND | {"diag/rank/readout": 1.3, "diag/rank_limit/readout": 16})
    assert flat.kind == "collapsed"
    assert flat.sentence.startswith("The effective rank of the readout is 1.3 of 16: it has collapsed")
    for rank, limit in ((1.6, 16), (1.0, 1), (1.3, 4)):  # of few rows no rank says anything
        columns = {"diag/rank/readout": rank, "diag/rank_limit/readout": limit}
        assert judge_records(records(**SOUND, **columns), {}) == []


@pytest.mark.parametrize(
    ("ratio", "word"), [(9e-6, "hardly moves"), (0.11, "jumps"), (1e-3, None), (0.0, None)]
)
def test_update_ratio_outside_its_bounds(ratio: float, word: str | None) -> None:
    found = judge_records(records(**SOUND, **{"diag/update_ratio/fusion": ratio}), {})
    assert [finding.sentence.split(":")[0] for finding in found] == ([f"The fusion {word}"] if word else [])


@pytest.mark.parametrize(
    ("scale", "said"), [(400, "mostly noise"), (3, "averages out"), (300, None), (4, None)]
)
def test_noise_scale_is_compared_with_the_batch(scale: float, said: str | None) -> None:
    samples = [32.0 * step for step in STEPS]
    found = judge_records(records(**SOUND, **{"diag/noise_scale": scale, "data/samples": samples}), {})
    assert kinds(found) == (["noise_scale"] if said else [])
    if said:
        assert said in found[0].sentence and "the batch 32" in found[0].sentence


def test_spikes_are_a_hint_and_many_are_a_warning() -> None:
    few = judge_records(
        records(**SOUND, **{"diag/spikes": [0] * 10 + [1] * 10, "diag/spike/align": [7.0]}), {}
    )
    assert [(f.kind, f.severity) for f in few] == [("loss_spikes", "hint")]
    assert few[0].sentence == "1 loss spike in 1,000 steps (last: align at step 50)."
    assert only(SOUND | {"diag/spikes": 3}).severity == "warning"
    assert judge_records(records(**SOUND, **{"diag/spikes": 0}), {}) == []


def test_always_clipped_names_norm_and_limit() -> None:
    columns = {"optim/clip_share": 0.99, "optim/grad_norm": 6.5}
    found = only(columns, {"training": {"gradients": {"clip_norm": 1.0}}})
    assert found.sentence == "99 % of the steps are clipped (mean gradient norm 6.5, clip_norm 1)."
    assert judge_records(records(**{"optim/clip_share": [1.0] * 5 + [0.1] * 15}), {}) == []
    assert judge_records(records(**{"optim/clip_share": [1.0] * 5}), {}) == []  # too short to say


def test_overfitting_is_a_held_out_rise_against_a_training_fall() -> None:
    falling = [2.0 - 0.05 * n for n in range(20)]
    held = {"valid/align": ([250, 500, 750, 1000], [1.7, 1.6, 1.9, 2.4])}

    def judged(train: list[float], valid: dict[str, tuple[list[int], list[float]]]) -> list[Finding]:
        given = records(**{"loss/align/raw": train})
        return judge_records(Records(columns={**given.columns, **valid}), {})

    found = judged(falling, held)
    assert [(f.kind, f.term) for f in found] == [("overfit", "align")]
    assert found[0].number == pytest.approx(0.5)
    assert "rose by 50 % since step 500 (1.6 to 2.4)" in found[0].sentence
    assert judged(falling[::-1], held) == []  # training rises too: not overfitting
    assert judged(falling, {"valid/align": ([250, 500, 750, 1000], [1.9, 1.7, 1.6, 1.65])}) == []
    assert judged(falling, {"valid/align": ([250, 500], [1.0, 2.0])}) == []


@pytest.mark.parametrize(
    ("value", "expected"), [(3.46, ["at_chance"]), (1.02, ["at_floor"]), (2.0, []), (3.3, [])]
)
def test_term_between_floor_and_chance(value: float, expected: list[str]) -> None:
    columns = {"loss/align/raw": value, "metric/align/floor": 1.0, "metric/align/chance": 3.47}
    assert kinds(judge_records(records(**columns), {})) == expected


def test_chance_is_compared_with_the_cross_entropy_where_a_term_reports_one() -> None:
    columns = {"loss/text/raw": 9.0, "metric/text/cross_entropy": 1.0, "metric/text/chance": 3.0}
    assert judge_records(records(**columns), {}) == []


def test_grave_findings_come_first_and_foreign_configs_do_no_harm() -> None:
    columns = shares("vision", action=0.25, state=0.75) | {
        "diag/dead/readout": 0.5,
        "diag/update_ratio/fusion": 1.0,
    }
    for config in ({}, {"objective": None}, {"objective": {"state": 3, "action": []}}, {"training": []}):
        assert [f.severity for f in judge_records(records(**columns), config)] == ["fault", "warning", "hint"]
