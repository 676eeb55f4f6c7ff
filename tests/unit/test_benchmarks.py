"""The benchmarks' own arithmetic: shares, ratios, arms, equal time, paired intervals, what is reused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diagnostics_cost
import joint_cell
import joint_scores
import joint_training
import pytest
import recorded
import rescore
import tables
import timing
import train_step

from tutti.config.run_config import RunConfig, load_config
from tutti.runs.build import build_data
from tutti.types import UserError

ROOT = Path(__file__).resolve().parents[2]


TASKS = ("reach", "push")


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config(ROOT / "configs" / "demo.yaml", ["data.batch_size=4", "training.threads=1"])


def trained(seed: int, reach: list[int], push: list[int], arm: str = "all") -> Any:
    successes = {"reach": reach, "push": push}
    return joint_scores.Trained(
        arm=arm, seed=seed, steps=10, seconds=2.0, valid_action=0.5, successes=successes, commit="c"
    )


def record(step: int, seconds: float, data_share: float) -> dict[str, Any]:
    shares = {"data": data_share, "forward": 0.3, "backward": 0.4, "optimizer": 0.1, "diagnostics": 0.0}
    return {
        **{"step": step, "kind": "train", "time/seconds": seconds, "data/samples": 32.0 * step},
        **{f"time/{part}_share": share for part, share in shares.items()},
    }


def test_arms_are_measured_in_turns_after_one_uncounted_turn_each() -> None:
    turns: list[str] = []

    def timer(name: str) -> Any:
        return lambda steps: turns.append(name) or float(len(turns))

    times = timing.interleave({"a": timer("a"), "b": timer("b")}, rounds=2, steps=3)
    assert turns == ["a", "b", "a", "b", "a", "b"]
    assert times == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_ratio_is_taken_within_each_round() -> None:
    found = timing.ratios({"base": [1.0, 10.0, 100.0], "arm": [2.0, 20.0, 200.0]}, "base")
    assert (found["arm"].low, found["arm"].median, found["arm"].high) == (2.0, 2.0, 2.0)


def test_breakdown_leaves_the_warm_up_out_and_weighs_records_by_their_seconds() -> None:
    records = [record(10, 100.0, 0.9), record(20, 101.0, 0.0), record(30, 104.0, 0.04)]
    found = train_step.breakdown(records, warmup=10)
    assert found.samples_per_second == pytest.approx(20 * 32 / 4.0)
    assert found.shares["data"] == pytest.approx(0.03)
    assert sum(found.shares.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("of_matmul", "data", "added", "verdicts"),
    [(0.45, 0.0099, 1.25, [True, True, True]), (0.449, 0.01, 1.251, [False, False, False])],
)
def test_acceptance_lines_pass_and_fail_at_their_limits(
    of_matmul: float, data: float, added: float, verdicts: list[bool]
) -> None:
    lines = train_step.checks(of_matmul, data, timing.spread([added]))
    assert [line.passed for line in lines] == verdicts
    assert [row[-1] for row in train_step.check_table(lines).rows] == [
        "PASS" if verdict else "FAIL" for verdict in verdicts
    ]


def test_cost_of_looking_is_spread_over_the_cadence() -> None:
    look = timing.Spread(median=2.5, low=2.0, high=3.0)
    found = diagnostics_cost.added(look, every=50, search=0.001)
    assert (found.low, found.median, found.high) == pytest.approx((0.05, 0.0745, 0.099))


@pytest.mark.parametrize(
    ("arm", "terms"),
    [
        ("all", {"align", "action", "recon", "state"}),
        ("no_align_recon", {"action", "state"}),
        ("no_state", {"align", "action", "recon"}),
        ("action_only", {"action"}),
    ],
)
def test_arm_keeps_exactly_its_terms(config: RunConfig, arm: str, terms: set[str]) -> None:
    assert set(timing.with_arm(config, arm).objective.terms()) == terms


def test_flops_grow_with_the_terms_and_newton_schulz_is_counted_apart(
    config: RunConfig, tmp_path: Path
) -> None:
    data = recorded.synthetic_run(tmp_path / "data", config, per_task=2, length=12)
    counted = {}
    for arm in ("action_only", "all"):
        timer = timing.StepTimer(timing.with_arm(config, arm), data, tmp_path / arm)
        weights = {name: value.clone() for name, value in timer.trainer.model.state_dict().items()}
        counted[arm] = timer.flops(batches=1)
        after = timer.trainer.model.state_dict()
        assert all(bool((after[name] == value).all()) for name, value in weights.items())
        assert timer(1) > 0
        timer.close()
    alone, everything = counted["action_only"], counted["all"]
    assert alone.forward < everything.forward < 2 * alone.forward  # align looks at a second picture
    assert alone.optimizer == everything.optimizer > 0  # the terms' heads are AdamW's
    assert alone.forward < alone.backward < 2.05 * alone.forward


def test_equal_time_gives_a_cheaper_arm_more_steps_and_never_fewer() -> None:
    assert joint_training.equal_time_steps(1000, 0.8) == 1250
    assert joint_training.equal_time_steps(1000, 1.01) == 1000


def test_cell_is_one_thread_with_its_seed_everywhere_and_no_controls(config: RunConfig) -> None:
    own = joint_cell.cell_config(config, Path("demo"), arm="action_only", seed=2, steps=50, starts=3)
    assert (own.seed, own.data.seed, own.training.seed) == (2, 2, 2)
    assert (own.training.threads, own.training.steps, own.training.schedule.warmup) == (1, 50, 5)
    assert (own.evaluation.workers, own.evaluation.episodes, own.evaluation.split) == (1, 3, "held_out")
    controls = own.evaluation.controls
    assert controls.expert == controls.noop == controls.no_image == controls.wrong_instruction == 0
    assert set(own.objective.terms()) == {"action"}
    assert own.data.sources[0].path == Path("demo/dataset").resolve()


def test_cell_folder_depends_on_arm_seed_steps_and_data_but_not_on_the_place_of_the_run(
    config: RunConfig, tmp_path: Path
) -> None:
    def folder(run: str = "a", data: str = "d", **changes: Any) -> Path:
        what: dict[str, Any] = {"arm": "all", "seed": 0, "steps": 50, "starts": 3} | changes
        return joint_cell.make_cell(config, tmp_path / run, tmp_path, data, **what).folder

    others = [folder(arm="no_state"), folder(seed=1), folder(steps=60), folder(starts=4), folder(data="e")]
    assert folder() == folder(run="b")
    assert len({folder(), *others}) == 6


def test_score_sums_tasks_over_seeds_and_compares_with_all() -> None:
    base = [trained(0, [1, 1], [1, 0]), trained(1, [1, 1], [0, 0])]
    less = [trained(0, [1, 0], [1, 0], "no_state"), trained(1, [1, 0], [0, 0], "no_state")]
    whole, part = joint_scores.score("steps", base, base), joint_scores.score("time", less, base)
    assert whole.against is None
    assert whole.seed_means == (0.75, 0.5)
    assert part.tasks == {"reach": (2, 4), "push": (1, 4)}
    assert part.against.difference.value == pytest.approx(-0.25)
    shown = [
        table([whole, part], joint_training.LABELS)
        for table in (joint_scores.mean_table, joint_scores.difference_table, joint_scores.task_table)
    ]
    assert "| without state, equal time | 2/4 | 1/4 |" in shown[2].markdown()
    assert all(len(row) == len(table.heads) for table in shown for row in table.rows)
    json.dumps(joint_scores.plain([whole, part]))


def test_a_touched_run_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "one").write_text("1")
    before = recorded.snapshot(tmp_path)
    recorded.require_unchanged(before, recorded.snapshot(tmp_path))
    (tmp_path / "dataset" / "new").write_text("2")
    with pytest.raises(UserError, match="dataset/new"):
        recorded.require_unchanged(before, recorded.snapshot(tmp_path))


def test_building_the_data_of_a_recorded_run_writes_nothing_into_it(
    config: RunConfig, tmp_path: Path
) -> None:
    run = recorded.synthetic_run(tmp_path / "run", config, per_task=1, length=9)
    (run / "stages.json").write_text('{"record": {"finished": true, "seconds": 1, "inputs": {}}}')
    before, names = recorded.snapshot(run), sorted(run.iterdir())
    assert recorded.check_recorded(run, config)
    build_data(config, run)
    recorded.require_unchanged(before, recorded.snapshot(run))
    assert sorted(run.iterdir()) == names


def test_published_tables_follow_from_the_successes_beside_them(tmp_path: Path) -> None:
    studies = ("joint_training", "study_decoders", "study_e2")  # the last has comparisons fixed beforehand
    names = [f"{name}{end}" for name in studies for end in (".json", ".md")]
    for name in names:
        shutil.copy(tables.RESULTS / name, tmp_path / name)
    rescore.main(tmp_path)
    for name in names:
        assert (tmp_path / name).read_text().splitlines() == (tables.RESULTS / name).read_text().splitlines()
